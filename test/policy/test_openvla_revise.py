"""Tokens guessed and revised together are those of greedy decoding, in fewer passes where the guess is near."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shown_noise import observations

from vla_edge.compress.calibrate import collect
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.build import build
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint, load_policy

CHECKPOINT = Path(__file__).parents[1] / "parity" / "openvla" / "openvla" / "checkpoint"
TOKENS = 7


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(CHECKPOINT)


def runners(checkpoint, **spec):
    one_by_one, together = load_policy(checkpoint), load_policy(checkpoint)
    together.revise_()
    changed = replace(checkpoint, spec=replace(checkpoint.spec, **spec))
    return Runner.from_policy(one_by_one, checkpoint), Runner.from_policy(together, changed)


def test_the_chunk_is_that_of_decoding_one_by_one(checkpoint):
    greedy, revised = runners(checkpoint)
    passes = []
    for observation in observations(checkpoint.spec, 12):
        expected = greedy.infer(observation).chunk.positions
        np.testing.assert_array_equal(revised.infer(observation).chunk.positions, expected)
        passes.append(revised._loop.passes)
        np.testing.assert_array_equal(revised.infer(observation).chunk.positions, expected)
        assert revised._loop.passes == 1, "the guess is the last chunk, and it stands"
    assert 1 < max(passes) <= TOKENS - 1


def test_a_pass_scores_as_decoding_does(checkpoint):
    """Not only the likeliest token: all scores, each after the same tokens."""
    policy = load_policy(checkpoint)
    policy.revise_()
    c = policy.config
    generator = torch.Generator().manual_seed(0)
    shape = (c.layers, 1, c.kv_heads, c.prompt_length, c.head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    cache = keys, values, (torch.arange(c.prompt_length) < c.prompt_length - 2).float()[None]
    tail = torch.zeros(2, c.layers, 1, c.kv_heads, c.tokens - 1, c.head_dim)
    tokens = torch.randint(0, 256, (1, c.tokens - 1), generator=generator)
    position = torch.tensor([c.prompt_length - 2])
    with torch.no_grad():
        (found,) = policy.revise(tokens, position, *cache)
        for row in range(c.tokens - 1):
            token = tokens[:, row : row + 1]
            scores, new_keys, new_values = policy.decode(token, torch.tensor([row]), position, *tail, *cache)
            torch.testing.assert_close(found[:, row], scores, atol=2e-4, rtol=1e-4)
            tail[..., row, :] = torch.stack([new_keys, new_values])[..., 0, :]


def test_passes_can_be_bounded(checkpoint):
    greedy, revised = runners(checkpoint, most_passes=1)
    for observation in observations(checkpoint.spec, 3):
        found, exact = (runner.infer(observation).chunk.positions for runner in (revised, greedy))
        assert revised._loop.passes == 1
        # the first is told by the prompt alone, the second by the first
        np.testing.assert_array_equal(found[0, :2], exact[0, :2])


@pytest.mark.parametrize("rounded", [False, True])
def test_a_bundle_decodes_together(checkpoint, tmp_path, rounded):
    steps = [{"fixed_point": {}}, *([{"quantize": {"targets": ["*"], "weights": "int8"}}] if rounded else [])]
    data = collect(observations(checkpoint.spec, 12), "random observations", frames=6, held_out=4)
    path = build(CHECKPOINT, parse_recipe({"name": "together", "steps": steps}), "onnxruntime", tmp_path / "b", data)
    bundle = Bundle.load(path)
    assert [stage.interface.name for stage in bundle.stages] == ["vision", "prefill", "revise"]
    engine, policy = Runner.from_bundle(path), Runner.from_checkpoint(CHECKPOINT)
    alike = [
        np.abs(engine.infer(o).chunk.positions - policy.infer(o).chunk.positions).max() < 2e-3 for o in data.held_out
    ]
    # rounding moves a random policy's likeliest tokens now and then
    assert all(alike) if not rounded else any(alike)


def test_policies_without_tokens_are_refused(tmp_path):
    path = CHECKPOINT.parents[1] / "oft" / "checkpoint"
    data = collect(observations(load_checkpoint(path).spec, 6), "random observations", frames=3, held_out=2)
    with pytest.raises(RecipeError, match="fixed_point is for policies that write three tokens or more"):
        build(path, parse_recipe({"steps": [{"fixed_point": {}}]}), "onnxruntime", tmp_path / "b", data)
