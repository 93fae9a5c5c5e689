"""Tokens that a draft proposes are those of greedy decoding or do not stand, whoever proposes them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shown_noise import observations

from vla_edge.compress.calibrate import collect
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.build import build
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.drafting import ChunkHistory
from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import CheckpointError, load_checkpoint, load_policy
from vla_edge.policy.draft_shapes import BLOCK, MEDUSA, DraftConfig
from vla_edge.policy.openvla_draft import make_draft

CHECKPOINT = Path(__file__).parents[1] / "parity" / "openvla" / "openvla" / "checkpoint"
TOKENS, WIDTH, VOCABULARY = 7, 16, 32064


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def greedy(checkpoint):
    """Observations and the chunks of decoding one by one."""
    runner = Runner.from_checkpoint(CHECKPOINT)
    shown = observations(checkpoint.spec, 60)
    return shown, [runner.infer(observation).chunk.positions for observation in shown]


def medusa_tensors(heads: int, rows: int, layers: int = 1) -> dict[str, torch.Tensor]:
    """As the Medusa project names them."""
    generator, found = torch.Generator().manual_seed(4), {}
    for head in range(heads):
        for layer in range(layers):
            found[f"{head}.{layer}.linear.weight"] = torch.randn(WIDTH, WIDTH, generator=generator) / 4
            found[f"{head}.{layer}.linear.bias"] = torch.randn(WIDTH, generator=generator)
        found[f"{head}.{layers}.weight"] = torch.randn(rows, WIDTH, generator=generator)
    return found


def speculating(checkpoint, draft: str = "history", tokens: int | None = None, **spec) -> Runner:
    """A runner of the policy with a random draft of that kind."""
    policy = load_policy(checkpoint)
    if draft != "history":
        torch.manual_seed(1)
        wide = {"width": 32, "hidden": 48} if draft == BLOCK else {}
        policy.draft = make_draft(DraftConfig(draft, WIDTH, TOKENS, 1, TOKENS - 2, **wide))
    policy.speculate_(tokens)
    return Runner.from_policy(policy.eval(), replace(checkpoint, spec=replace(checkpoint.spec, **spec)))


@pytest.mark.parametrize("tokens", [1, 3, 5])
@pytest.mark.parametrize("draft", ["history", BLOCK, MEDUSA])
def test_the_chunk_is_that_of_decoding_one_by_one(checkpoint, greedy, draft, tokens):
    runner, passes = speculating(checkpoint, draft, tokens, draft_chunks=4), []
    for observation, expected in zip(*greedy):
        inference = runner.infer(observation)
        np.testing.assert_array_equal(inference.chunk.positions, expected)
        assert inference.timing.decoded == TOKENS - 1
        passes.append(inference.timing.passes)
    assert -(-(TOKENS - 1) // (tokens + 1)) <= min(passes) and max(passes) <= TOKENS - 1


@pytest.mark.parametrize(("shift", "passes"), [(0, 2), (1, TOKENS - 1), (128, TOKENS - 1)])
def test_a_draft_decides_how_many_passes_it_takes_and_nothing_else(checkpoint, greedy, shift, passes, monkeypatch):
    """One that knows the chunk, and ones that are always wrong, by one bin or by half of all."""
    plain, runner = Runner.from_checkpoint(CHECKPOINT), speculating(checkpoint, tokens=3)
    monkeypatch.setattr(
        ChunkHistory, "propose", lambda self, known, count: (plain._loop._chosen[len(known) :][:count] + shift) % 256
    )
    for observation, expected in zip(*greedy):
        plain.infer(observation)
        inference = runner.infer(observation)
        np.testing.assert_array_equal(inference.chunk.positions, expected)
        assert inference.timing.passes == passes
        assert inference.timing.tokens_per_pass == (TOKENS - 1) / passes


def test_a_tolerance_takes_neighbours_of_the_likeliest_tokens(checkpoint, greedy, monkeypatch):
    plain, runner = Runner.from_checkpoint(CHECKPOINT), speculating(checkpoint, tokens=5, draft_tolerance=1)
    monkeypatch.setattr(
        ChunkHistory, "propose", lambda self, known, count: np.clip(plain._loop._chosen[len(known) :][:count] + 1, 0, 255)
    )
    changed = False
    for observation, expected in zip(*greedy):
        plain.infer(observation)
        found = runner.infer(observation).chunk.positions
        np.testing.assert_array_equal(found[0, 0], expected[0, 0])  # the prompt tells it, and nobody drafts it
        changed |= bool((found != expected).any())
    assert changed


def test_what_was_seen_is_proposed_again(checkpoint):
    """Of two scenes that take turns, the last chunk alone is the wrong one."""
    first, second = observations(checkpoint.spec, 2)
    passes = {}
    for chunks in (1, 2):
        runner = speculating(checkpoint, tokens=5, draft_chunks=chunks)
        passes[chunks] = [runner.infer(observation).timing.passes for observation in (first, second, first, second)]
    assert passes[2][2:] == [1, 1] and min(passes[1]) > 1


def test_history_goes_on_from_the_nearest_chunk():
    history = ChunkHistory(2, 4)
    assert history.propose([7], 3).size == 0
    for chunk in ([9, 1, 1, 1], [100, 2, 2, 2], [120, 3, 3, 3]):
        history.add(chunk)
    assert history.propose([90], 9).tolist() == [2, 2, 2]
    assert history.propose([119, 2], 1).tolist() == [3]
    assert history.propose([110], 2).tolist() == [3, 3], "of equally near ones the newest"
    assert history.propose([9], 1).tolist() == [2], "the first is forgotten"


def test_a_window_scores_as_decoding_does(checkpoint):
    """Not only the likeliest token: all scores, and keys and values, each after the same tokens."""
    policy = load_policy(checkpoint)
    policy.speculate_(3)
    c, generator = policy.config, torch.Generator().manual_seed(0)
    shape = (c.layers, 1, c.kv_heads, c.prompt_length, c.head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    cache = keys, values, (torch.arange(c.prompt_length) < c.prompt_length - 2).float()[None]
    tail = torch.zeros(2, c.layers, 1, c.kv_heads, c.tokens - 1, c.head_dim)
    tokens = torch.randint(0, 256, (1, c.tokens - 1), generator=generator)
    position = torch.tensor([c.prompt_length - 2])
    with torch.no_grad():
        for step in range(c.tokens - 1):
            if step == 2:
                stale = tail.clone()
                stale[..., 2:, :] = 7.0  # of tokens that were proposed and did not stand
                window = policy.verify(tokens[:, 2:6], torch.tensor([2]), position, *stale, *cache)
            one = policy.decode(tokens[:, step : step + 1], torch.tensor([step]), position, *tail, *cache)
            tail[..., step, :] = torch.stack(one[1:])[..., 0, :]
            if step >= 2:
                torch.testing.assert_close(window[0][:, step - 2], one[0], atol=2e-4, rtol=1e-4)
                torch.testing.assert_close(window[1][..., step - 2, :], one[1][..., 0, :], atol=2e-5, rtol=1e-4)


# checkpoints


def copied(tmp_path, **files) -> Path:
    directory = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, directory)
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors")
    return directory


@pytest.mark.parametrize("rows", [256, VOCABULARY])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_medusa_heads_are_used_where_the_checkpoint_has_them(tmp_path, greedy, rows, prefix):
    tensors = medusa_tensors(3, rows, layers=2)
    path = copied(tmp_path, medusa_lm_head={prefix + name: value for name, value in tensors.items()})
    runner = Runner.from_checkpoint(path)
    assert list(runner.stages) == ["vision", "prefill", "verify", "draft"]
    for observation, expected in list(zip(*greedy))[:12]:
        np.testing.assert_array_equal(runner.infer(observation).chunk.positions, expected)
    feature = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2))
    proposed = runner.stages["draft"].run({"feature": feature.numpy(), "step": np.zeros(1, np.int64)})["draft_scores"][0]
    first = slice(None) if rows == 256 else slice(VOCABULARY - 64 - 256, VOCABULARY - 64)
    for head in range(3):
        x = feature
        for layer in range(2):
            weight, bias = (tensors[f"{head}.{layer}.linear.{kind}"] for kind in ("weight", "bias"))
            x = x + torch.nn.functional.silu(x @ weight.T + bias)
        np.testing.assert_allclose(proposed[head], (x @ tensors[f"{head}.2.weight"][first].T)[0], atol=1e-4)


def test_medusa_heads_may_lie_among_the_weights(tmp_path):
    path = copied(tmp_path)
    shard = sorted(path.glob("model-*.safetensors"))[-1]
    heads = {f"medusa_head.{name}": value for name, value in medusa_tensors(2, 256).items()}
    save_file(load_file(shard) | heads, shard, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(heads, shard.name)
    index.write_text(json.dumps(content))
    assert load_policy(load_checkpoint(path)).draft.config == DraftConfig(MEDUSA, WIDTH, TOKENS, 1, 2)
    assert load_policy(load_checkpoint(CHECKPOINT)).draft is None


def test_pickled_heads_and_damaged_drafts_are_refused(tmp_path):
    path = copied(tmp_path)
    (path / "medusa_lm_head.pt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="medusa_lm_head.pt is a pickle"):
        load_policy(load_checkpoint(path))
    (path / "medusa_lm_head.pt").unlink()
    tensors = medusa_tensors(3, 256)
    del tensors["1.0.linear.bias"]
    save_file(tensors, path / "medusa_lm_head.safetensors")
    with pytest.raises(CheckpointError, match="medusa_head.1.0.linear.bias"):
        load_policy(load_checkpoint(path))


# recipes and bundles


@pytest.mark.parametrize(("step", "stages"), [
    ({"draft": "history", "tokens": 3}, ["vision", "prefill", "verify"]),
    ({"tokens": 2}, ["vision", "prefill", "verify", "draft"]),
], ids=["history", "trained"])  # fmt: skip
def test_a_bundle_speculates_to_the_chunk_of_one_that_does_not(tmp_path, checkpoint, step, stages):
    path = copied(tmp_path, medusa_lm_head=medusa_tensors(4, 256))
    data = collect(observations(checkpoint.spec, 12), "random observations", frames=6, held_out=6)
    quantize = {"quantize": {"targets": ["prefill", "draft"], "weights": "int8"}}

    def built(name: str, *steps) -> Path:
        return build(path, parse_recipe({"name": name, "steps": [*steps, quantize]}), "onnxruntime", tmp_path / name, data)

    bundle = Bundle.load(built("speculates", {"speculate": step}))
    assert [stage.interface.name for stage in bundle.stages] == stages
    engine = Runner.from_bundle(bundle.directory)
    plain = Runner.from_bundle(built("plain", {"speculate": {"draft": "none"}}))
    for observation in data.held_out:
        np.testing.assert_array_equal(engine.infer(observation).chunk.positions, plain.infer(observation).chunk.positions)


@pytest.mark.parametrize(("steps", "said"), [
    ([{"speculate": {"draft": "trained"}}], "the checkpoint has no draft; train one with vla-edge draft"),
    ([{"speculate": {"tokens": 6}}], "tokens is 6, allowed is 1 to 5"),
    ([{"speculate": {"tokens": 0}}], "tokens is 0"),
    ([{"speculate": {"draft": "histroy"}}], "draft is 'histroy'"),
    ([{"speculate": {"chunks": 1000}}], "chunks is 1000, allowed is 1 to 256"),
    ([{"speculate": {"tolerance": -1}}], "tolerance is -1"),
    ([{"speculate": {}}, {"fixed_point": {}}], "decode in different ways; drop one"),
    ([{"speculate": {}}, {"speculate": {}}], "is there twice"),
])  # fmt: skip
def test_what_cannot_be_had_is_an_error(tmp_path, checkpoint, steps, said):
    data = collect(observations(checkpoint.spec, 4), "random observations", frames=2, held_out=2)
    with pytest.raises(RecipeError, match=said):
        build(CHECKPOINT, parse_recipe({"name": "wrong", "steps": steps}), "onnxruntime", tmp_path / "b", data)


def test_policies_without_tokens_are_refused(tmp_path):
    path = CHECKPOINT.parents[1] / "oft" / "checkpoint"
    data = collect(observations(load_checkpoint(path).spec, 6), "random observations", frames=3, held_out=2)
    for step in ("speculate", "prefill_blocks"):
        with pytest.raises(RecipeError, match=f"{step} is for policies that write three tokens or more"):
            build(path, parse_recipe({"steps": [{step: {}}]}), "onnxruntime", tmp_path / "b", data)


@pytest.mark.parametrize("draft", [BLOCK, MEDUSA])
def test_files_hold_what_the_policy_computes_in_operators_that_runtimes_have(checkpoint, tmp_path, draft):
    """ONNX Runtime, and the readers of other runtimes by the one that runs wherever PyTorch does."""
    from vla_edge.engine.backends import StageInterface, onnxruntime
    from vla_edge.engine.backends import torch as reader
    from vla_edge.engine.export import export_stage

    policy = load_policy(checkpoint)
    torch.manual_seed(1)
    wide = {"width": 32, "hidden": 48} if draft == BLOCK else {}
    policy.draft = make_draft(DraftConfig(draft, WIDTH, TOKENS, 1, TOKENS - 2, **wide))
    policy.speculate_(2)
    policy.read_blocks_(8)
    ours = Runner.from_policy(policy.eval(), checkpoint)
    given = dict(reversed(list(ours.stage_inputs(observations(checkpoint.spec, 1)[0]))))  # of each stage the first call
    for stage in policy.stages()[1:]:
        file = export_stage(stage, {}, tmp_path / f"{stage.name}.onnx")
        interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        expected = ours.stages[stage.name].run(given[stage.name])
        for runtime in (onnxruntime, reader):
            for name, value in runtime.load(file, interface).run(given[stage.name]).items():
                np.testing.assert_allclose(value, expected[name], atol=2e-4, rtol=1e-3, err_msg=f"{stage.name} {name}")
