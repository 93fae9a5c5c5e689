"""A prompt read in blocks gives what reading it at once gives; what has not changed since the last time is not read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_edge.compress.calibrate import collect
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.build import build, cache_bytes
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity"
OPENVLA = SAVED / "openvla" / "openvla" / "checkpoint"
PERIOD_NS = 200_000_000
INSTRUCTIONS = ("touch the red cube", "push the ball")


def observation(spec, index: int, seed: int, instruction: str = INSTRUCTIONS[0], state: int = 0) -> Observation:
    """The `index`th of a recording, with pictures of `seed` and joints of `state`."""
    rng = np.random.default_rng(seed)
    images = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), dtype=np.uint8) for c in spec.cameras}
    names = tuple(dict.fromkeys((*spec.joint_names, *spec.read_names)))
    joints = JointState(index, names, np.random.default_rng(state).normal(0, 0.3, len(names)))
    return Observation(index * PERIOD_NS, images, joints, instruction)


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(OPENVLA)


def in_blocks(checkpoint, size: int, **changes) -> Runner:
    policy = load_policy(checkpoint)
    policy.read_blocks_(size)
    return Runner.from_policy(policy, replace(checkpoint, spec=replace(checkpoint.spec, **changes)))


def reads(runner: Runner) -> list[int]:
    """Where the blocks begin that are read from now on; 0 of a prompt that is read at once."""
    begins, call, loop = [], runner._loop._read, runner._loop

    def counted() -> None:
        begins.append(int(loop.buffers["begin"][0]) if "begin" in loop.buffers else 0)
        call()

    loop._read = counted
    return begins


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_blocks_make_the_cache_and_the_scores_of_a_prompt_read_at_once(checkpoint, size):
    policy, c = load_policy(checkpoint), load_policy(checkpoint).config
    whole, blocks = Runner.from_policy(policy, checkpoint), in_blocks(checkpoint, size)
    for index in range(3):
        shown = observation(checkpoint.spec, index, index, INSTRUCTIONS[index % 2])
        expected, found = whole.infer(shown).chunk, blocks.infer(shown).chunk
        np.testing.assert_array_equal(found.positions, expected.positions)
        ours, theirs = blocks._loop.buffers, whole._loop.buffers
        real = int(theirs["position"][0])
        assert real == ours["position"][0] < c.prompt_length
        np.testing.assert_array_equal(ours["cache_mask"], theirs["cache_mask"])
        for kind in ("cache_keys", "cache_values"):
            np.testing.assert_allclose(ours[kind][..., :real, :], theirs[kind][..., :real, :], atol=2e-5, rtol=1e-4)


def test_padding_is_not_read(checkpoint):
    """Blocks behind the last word tell nothing."""
    runner = in_blocks(checkpoint, 4)
    begins = reads(runner)
    runner.infer(observation(checkpoint.spec, 0, 0))
    last = int(runner._loop.buffers["position"][0]) - 1
    assert begins == list(range(0, last + 1, 4)) and begins[-1] + 4 < load_policy(checkpoint).config.prompt_length


def test_tensors_between_layers_are_as_long_as_a_block(checkpoint):
    policy = load_policy(checkpoint)
    policy.read_blocks_(4)
    stage = policy.stages()[1]
    longest = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: longest.append(inputs[0].shape[1]))
        for layer in policy.prefill.layers.modules() if isinstance(layer, torch.nn.Linear)
    ]  # fmt: skip
    with torch.no_grad():
        stage.module(*(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in stage.inputs))
    for hook in hooks:
        hook.remove()
    assert set(longest) == {4}


@pytest.mark.parametrize("steps", [
    [{"prefill_blocks": {"size": 8}}],
    [{"prefill_blocks": {"size": 8}}, {"speculate": {"draft": "history"}}],
    [{"fixed_point": {}}, {"prefill_blocks": {"size": 8}}],
], ids=["alone", "speculating", "together"])  # fmt: skip
def test_a_bundle_reads_in_blocks(tmp_path, checkpoint, steps, monkeypatch):
    # a build may choose ways that round in one of two engines, and bins are as near to each other as noise
    monkeypatch.setattr("vla_edge.engine.native.rewrite.library", lambda: None)
    shown = [observation(checkpoint.spec, index, index) for index in range(8)]
    data = collect(shown, "random observations", frames=4, held_out=4)
    quantize = {"quantize": {"targets": ["*"], "weights": "int8"}}
    paths = [
        build(OPENVLA, parse_recipe({"name": name, "steps": [*more, quantize]}), "onnxruntime", tmp_path / name, data)
        for name, more in (("blocks", steps), ("whole", ()))
    ]
    blocks, whole = (Runner.from_bundle(path) for path in paths)
    for one in data.held_out:
        np.testing.assert_array_equal(blocks.infer(one).chunk.positions, whole.infer(one).chunk.positions)
    sizes = [Bundle.load(path).manifest["cache"]["bytes"] for path in paths]
    assert sizes[0] == sizes[1] > 0


def test_blocks_and_a_rounded_cache_do_not_go_together(tmp_path, checkpoint):
    data = collect([observation(checkpoint.spec, i, i) for i in range(4)], "random", frames=2, held_out=2)
    recipe = parse_recipe({"name": "both", "steps": [{"prefill_blocks": {}}, {"kv_cache": {}}]})
    with pytest.raises(RecipeError, match="the cache is rounded as a whole; drop one"):
        build(OPENVLA, recipe, "onnxruntime", tmp_path / "b", data)


def test_the_cache_that_blocks_add_to_counts_as_one(checkpoint):
    policy = load_policy(checkpoint)
    plain = cache_bytes(policy.stages())
    policy.read_blocks_(8)
    assert cache_bytes(policy.stages()) == plain


# what is not read again


def test_a_still_picture_and_the_same_words_are_read_once(checkpoint):
    """Exactly then: with another picture or other words everything is read again, and chunks are those of reading anew."""
    spec = replace(checkpoint.spec, vision_cache=0.01)
    runner = Runner.from_policy(load_policy(checkpoint), replace(checkpoint, spec=spec))
    fresh = Runner.from_policy(load_policy(checkpoint), checkpoint)
    begins, counts = reads(runner), []
    for index, (seed, words, state) in enumerate([(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 2), (1, 1, 2), (0, 1, 2)]):
        shown = observation(spec, index, seed, INSTRUCTIONS[words], state)
        np.testing.assert_array_equal(runner.infer(shown).chunk.positions, fresh.infer(shown).chunk.positions)
        counts.append(len(begins))
    assert counts == [1, 1, 2, 2, 3, 4]


def test_of_a_prompt_in_blocks_new_words_are_read_alone(checkpoint):
    """Pictures come before the words, and nothing before a place looks at it."""
    runner = in_blocks(checkpoint, 2, vision_cache=0.01)
    fresh = Runner.from_policy(load_policy(checkpoint), checkpoint)
    begins, pictures = reads(runner), load_policy(checkpoint).config.image_tokens
    for index, (seed, words) in enumerate([(0, INSTRUCTIONS[0]), (0, INSTRUCTIONS[1]), (0, "push the"), (1, "push the")]):
        begins.clear()
        shown = observation(checkpoint.spec, index, seed, words)
        np.testing.assert_array_equal(runner.infer(shown).chunk.positions, fresh.infer(shown).chunk.positions)
        if index in (1, 2):
            assert begins and begins[0] >= pictures // 2 * 2
        else:
            assert begins[0] == 0


@pytest.mark.parametrize(("family", "moved", "again"), [
    ("pi0", 0.0, True), ("pi0", 1e-6, False), ("pi05", 1e-6, True), ("pi05", 0.5, False),
])  # fmt: skip
def test_a_flow_keeps_its_prefix_while_nothing_that_it_reads_changes(family, moved, again):
    """pi0 reads its state as numbers, pi0.5 as words, one of 256 for each joint."""
    checkpoint = load_checkpoint(SAVED / "pi" / family / "checkpoint")
    spec = replace(checkpoint.spec, vision_cache=0.01)
    runner = Runner.from_policy(load_policy(checkpoint), replace(checkpoint, spec=spec))
    fresh = Runner.from_policy(load_policy(checkpoint), checkpoint)
    begins = reads(runner)
    for index in range(2):
        shown = observation(spec, index, 0)
        joints = replace(shown.joints, position=shown.joints.position + moved * index)
        shown = replace(shown, joints=joints)
        np.testing.assert_array_equal(runner.infer(shown).chunk.positions, fresh.infer(shown).chunk.positions)
    assert len(begins) == (1 if again else 2)


def test_inferences_call_by_call_leave_no_picture_behind(checkpoint):
    """What `steps` looks at is not what the vision cache remembers."""
    spec = replace(checkpoint.spec, vision_cache=0.01)
    runner = Runner.from_policy(load_policy(checkpoint), replace(checkpoint, spec=spec))
    first, other = observation(spec, 0, 0), observation(spec, 1, 1)
    expected = runner.infer(first).chunk.positions
    for _, call in runner.steps(other):
        call()
    np.testing.assert_array_equal(runner.infer(replace(first, stamp_ns=2 * PERIOD_NS)).chunk.positions, expected)
