"""The prompt's cache of a policy that writes tokens crosses in the bits that the recipe says; what is added to it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vla_edge.compress.calibrate import collect
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.backends import StageInterface, onnxruntime
from vla_edge.engine.build import cache_bytes
from vla_edge.engine.export import export_stage
from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity" / "openvla"


def observations(spec, count: int) -> list[Observation]:
    rng, found = np.random.default_rng(5), []
    for index in range(count):
        images = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), dtype=np.uint8) for c in spec.cameras}
        joints = JointState(0, spec.read_names, rng.normal(0, 0.3, len(spec.read_names)))
        found.append(Observation(200_000_000 * index, images, joints, "touch the red cube"))
    return found


@pytest.fixture(scope="module")
def openvla():
    checkpoint = load_checkpoint(SAVED / "openvla" / "checkpoint")
    return load_policy(checkpoint), checkpoint, collect(observations(checkpoint.spec, 8), "random", frames=4, held_out=3)


def carried_out(loaded, *steps):
    policy, checkpoint, data = loaded
    return carry_out(parse_recipe({"name": "test", "steps": list(steps)}), policy, checkpoint, data, lambda *_: None).policy


def row_scores(policy, loaded) -> np.ndarray:
    """(frames, T - 1, bins) of all tokens after the first, each after the same tokens whatever was rounded."""
    tokens = np.linspace(0, 255, policy.config.tokens - 1, dtype=np.int64)[None]
    reader = Runner.from_policy(policy, loaded[1])
    found = []
    for observation in loaded[2].held_out:
        reader.infer(observation)
        buffers = reader._loop.buffers
        buffers["tokens"][...] = tokens
        reader._loop._revise()
        found.append(buffers["row_scores"][0].copy())
    return np.stack(found)


def test_fewer_bits_lose_more_and_salient_tokens_win_some_back(openvla):
    together = {"fixed_point": {"most_passes": 1}}
    reference = row_scores(carried_out(openvla, together), openvla)

    def error(**options) -> float:
        found = row_scores(carried_out(openvla, together, {"kv_cache": options}), openvla)
        return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))

    eight, four, half = error(bits=8), error(bits=4), error(bits=4, salient=0.5)
    assert 0 < 4 * eight < four and half < 0.9 * four


@pytest.mark.parametrize("steps", [
    [{"kv_cache": {}}], [{"kv_cache": {"bits": 4, "values": "channel", "salient": 0.3}}],
    [{"fixed_point": {}}, {"kv_cache": {"bits": 4}}],
], ids=["8", "salient", "together"])  # fmt: skip
def test_the_files_compute_what_the_policy_computes_in_pytorch(openvla, tmp_path, steps):
    policy = carried_out(openvla, *steps)
    ours, crossing = Runner.from_policy(policy, openvla[1]), {}
    for stage in policy.stages():
        file = export_stage(stage, {}, tmp_path / f"{stage.name}.onnx")
        crossing[stage.name] = onnxruntime.load(file, StageInterface(stage.name, stage.inputs, stage.outputs))
    for observation in openvla[2].held_out:
        for name, inputs in ours.stage_inputs(observation):
            expected = ours.stages[name].run(inputs)
            for output, value in crossing[name].run(inputs).items():
                assert value.dtype == expected[output].dtype and value.shape == expected[output].shape
                # a number between two points of a grid may fall either way
                apart = np.abs(value.astype(float) - expected[output].astype(float)) > 2e-3
                assert apart.mean() < 0.02, (name, output)
    whole = Runner(openvla[1].spec, openvla[1].tokenizer_path, crossing)
    assert np.isfinite(whole.infer(openvla[2].held_out[0]).chunk.positions).all()


def test_what_crosses_is_smaller_and_the_policy_itself_stays(openvla):
    policy = openvla[0]
    plain = cache_bytes(policy.stages())
    heads = policy.config.layers * policy.config.kv_heads * policy.config.head_dim
    assert plain == 4 * policy.config.prompt_length * (2 * heads + 1) + 8
    eight, four = (cache_bytes(carried_out(openvla, {"kv_cache": {"bits": bits}}).stages()) for bits in (8, 4))
    assert eight < 0.5 * plain and four < 0.7 * eight
    assert policy.prefill.store is None and policy.decode.load is None


def test_policies_that_read_their_prompt_once_have_no_cache_to_round():
    checkpoint = load_checkpoint(SAVED / "oft" / "checkpoint")
    data = collect(observations(checkpoint.spec, 4), "random", frames=2, held_out=1)
    with pytest.raises(RecipeError, match="kv_cache is for policies that read their keys and values again"):
        carried_out((load_policy(checkpoint), checkpoint, data), {"kv_cache": {}})
