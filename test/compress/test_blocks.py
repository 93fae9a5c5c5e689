"""Whole layers go with everything that depends on them, and those that are missed least go first."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_subject import WORDS, Subject, make_observations, tiny_policy, tiny_spec

from vla_edge.compress.calibrate import CalibrationError, collect
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.prune.blocks import skip_blocks
from vla_edge.compress.prune.tokens import choose_tokens
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.runner import Runner
from vla_edge.policy.blocks import Skipped
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.checkpoint_writer import write_checkpoint
from vla_edge.policy.smolvla import SmolVLA


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """(policy, checkpoint) of three vision and four text layers, whose expert looks within and across in turn."""
    torch.manual_seed(1)
    policy = SmolVLA(replace(tiny_policy().config, vision_layers=3, text_layers=4)).eval()
    directory = write_checkpoint(tmp_path_factory.mktemp("deep") / "checkpoint", policy, tiny_spec(), WORDS)
    checkpoint = load_checkpoint(directory)
    return load_policy(checkpoint), checkpoint


@pytest.fixture
def subject(deep):
    return Subject(copy.deepcopy(deep[0]), deep[1])


@pytest.fixture(scope="module")
def data():
    return collect(make_observations(12), "random observations", frames=8, held_out=4)


def silence(layer) -> None:
    """What goes in comes out: nothing is added to the residual."""
    with torch.no_grad():
        layer.out.weight.zero_()
        layer.mlp.down.weight.zero_()
        for part in (layer.out, layer.mlp.down):
            if part.bias is not None:
                part.bias.zero_()


def skip(subject, count: int, by: str, chosen=lambda block: True) -> list[str]:
    policy = subject.policy
    return skip_blocks(
        policy, count, lambda: [block for block in policy.blocks() if chosen(block)], by,
        lambda: Runner.from_policy(policy, subject.checkpoint), make_observations(4),
    )  # fmt: skip


def test_what_can_go_is_what_something_else_can_take_the_place_of(subject):
    names = [block.names for block in subject.policy.blocks()]
    vision = [(f"vision.encoder.layers.{i}",) for i in range(3)]
    experts = [(f"denoise.layers.{i}",) for i in range(3)]
    pairs = [(f"prefix.layers.{i}", f"denoise.layers.{i}") for i in range(3)]
    assert sorted(names) == sorted(vision + experts + pairs)


@pytest.mark.parametrize("by", ["action", "cosine"])
def test_layers_that_add_nothing_go_first_and_without_a_trace(subject, by):
    policy = subject.policy
    silence(policy.vision.encoder.layers[1])
    silence(policy.denoise.layers[2])
    silence(policy.denoise.layers[1])
    silence(policy.prefix.layers[1])
    before = subject.chunks()
    gone = skip(subject, 4, by)
    assert set(gone) == {"vision.encoder.layers.1", "denoise.layers.1", "denoise.layers.2", "prefix.layers.1"}
    after = Subject(policy, subject.checkpoint)
    np.testing.assert_allclose(after.chunks(), before, atol=1e-5)
    assert not [name for name in after.modules if name.startswith((*(f"{n}." for n in gone), "prefix.cross.1."))]
    keys = after.stages[1].outputs[0]
    assert keys.shape[0] == 2, "what nobody reads is not cached"


def test_the_one_the_chunk_misses_least_goes(subject):
    policy = subject.policy
    wanted, missed = subject.chunks(), {}
    for block in policy.blocks():
        undo = policy.skip_(block)
        missed[block.names] = np.abs(Subject(policy, subject.checkpoint).chunks() - wanted).mean() / len(block.names)
        undo()
    np.testing.assert_array_equal(Subject(policy, subject.checkpoint).chunks(), wanted)

    class Seeded:
        """Chunks as `Subject.chunks` makes them."""

        def __init__(self):
            self.runner = Runner.from_policy(policy, subject.checkpoint)

        def infer(self, observation):
            return self.runner.infer(observation, seed=3)

    gone = skip_blocks(policy, 1, lambda: [b for b in policy.blocks() if len(b.names) == 1], "action", Seeded,
                       make_observations(4, seed=9))  # fmt: skip
    alone = {names: loss for names, loss in missed.items() if len(names) == 1}
    assert tuple(gone) == min(alone, key=alone.get)


def test_a_pair_counts_as_two_and_is_not_begun_where_one_is_left(subject):
    assert skip(subject, 1, "action", lambda block: len(block.names) == 2) == []
    assert len(skip(subject, 2, "action", lambda block: len(block.names) == 2)) == 2


def test_something_always_stays(subject):
    gone = skip(subject, 100, "cosine")
    policy = subject.policy
    assert len(gone) == 2 + 3 + 3 and policy.blocks() == ()
    assert policy.prefix.read == (3,) and sum(isinstance(m, Skipped) for m in policy.vision.encoder.layers) == 2
    assert np.isfinite(Subject(policy, subject.checkpoint).chunks()).all()


def test_heads_channels_and_tokens_go_beside_layers_and_the_rest_is_rounded_and_trained(deep, data, tmp_path):
    recipe = parse_recipe({"name": "test", "steps": [
        {"shrink": {"targets": ["*"], "blocks": 0.5, "by": "cosine", "channels": 0.25, "heads": 0.5}},
        {"prune_tokens": {"keep": 0.5, "after": 1}},
        {"finetune": {"steps": 2, "batch": 4, "attention": 0.1}},
        {"quantize": {"targets": [f"vision.encoder.layers.{i}" for i in range(3)]}},
        {"keep": {"targets": ["denoise"], "dtype": "float16"}},
        {"kv_cache": {"bits": 4, "salient": 0.2}},
    ]})  # fmt: skip
    done = carry_out(recipe, *deep, data, lambda *_: None, work=tmp_path)
    left = [name for name in done.layers if name.endswith(".mlp.down")]
    assert len(left) == 3 + 3 + 4 - 4, "half of the eight that can go"
    assert np.isfinite(Runner.from_policy(done.policy, deep[1]).infer(data.held_out[0]).chunk.positions).all()
    assert deep[0].prefix.read == (0, 1, 2, 3) and len(deep[0].blocks()) == 9


def test_image_tokens_are_chosen_by_the_last_text_layer_left_where_the_one_asked_for_is_gone(subject):
    policy, count = subject.policy, 2
    skip(subject, 4, "cosine", lambda block: block.names[0] in ("prefix.layers.1", "prefix.layers.2"))
    choice = choose_tokens(policy, subject.checkpoint, 3, count, make_observations(2))
    policy.prefix.choice = choice
    left = Subject(policy, subject.checkpoint)
    assert policy.prefix.narrows_at == 0 and left.stages[1].outputs[0].shape[3] == 17 - 4 + count
    assert np.isfinite(left.chunks()).all()
    policy.prefix.choice = None
    skip(subject, 2, "cosine", lambda block: block.names[0] == "prefix.layers.0")
    with pytest.raises(RecipeError, match="no text layer is left"):
        choose_tokens(policy, subject.checkpoint, 3, count, make_observations(2))


def test_what_is_left_is_exported(deep, data, tmp_path):
    from vla_edge.engine.backends import StageInterface, onnxruntime
    from vla_edge.engine.export import export_stage

    recipe = parse_recipe({"steps": [{"shrink": {"targets": ["prefix", "denoise"], "blocks": 3, "by": "cosine"}}]})
    done = carry_out(recipe, *deep, data, lambda *_: None)
    ours, stages = Runner.from_policy(done.policy, deep[1]), {}
    for stage in done.policy.stages():
        stages[stage.name] = ours.stages[stage.name]
        if stage.name in ("prefix", "denoise"):
            file = export_stage(stage, {}, tmp_path / f"{stage.name}.onnx")
            interface = StageInterface(stage.name, stage.inputs, stage.outputs)
            stages[stage.name] = onnxruntime.load(file, interface)
    engine = Runner(deep[1].spec, deep[1].tokenizer_path, stages)
    for observation in data.held_out:
        difference = ours.infer(observation).chunk.positions - engine.infer(observation).chunk.positions
        assert np.abs(difference).max() < 1e-4


def test_without_observations_nothing_is_known_to_be_missed(subject):
    with pytest.raises(CalibrationError, match="no observations"):
        skip_blocks(subject.policy, 1, subject.policy.blocks, "action", lambda: subject.runner, [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ["*"], "blocks": 9}, "blocks is 9, which is 9 layers; 8 of its targets can be skipped"),
        ({"targets": ["vision"], "blocks": 3}, "2 of its targets"),
        ({"targets": ["vision"], "blocks": 0.1}, "which is 0 layers"),
        ({"targets": ["prefix"], "blocks": 1}, "0 of its targets"),
        ({"targets": ["*"], "blocks": 1.5}, "blocks is 1.5, allowed is"),
        ({"targets": ["*"], "blocks": -1}, "blocks is -1, allowed is"),
        ({"targets": ["*"], "blocks": 1, "by": "taste"}, "by is 'taste', allowed is action, cosine"),
    ],
)
def test_what_cannot_go_is_an_error_before_any_work(deep, data, options, said):
    with pytest.raises(RecipeError, match=said):
        carry_out(parse_recipe({"steps": [{"shrink": options}]}), *deep, data, lambda *_: pytest.fail("work has begun"))
