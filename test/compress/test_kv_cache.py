"""The cache crosses in the bits that the recipe says, and file, runtime and PyTorch agree on what it means."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_subject import Subject, make_observations

from vla_edge.compress.calibrate import collect
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.quantize.kv_cache import CHANNELS, TOKENS, CacheLoad, CacheStore, Grid
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.compress.steps import KVCache
from vla_edge.engine.runner import Runner
from vla_edge.policy.blocks import attention_columns, attention_weights
from vla_edge.policy.smolvla import PrefixCache

LENGTH = 17  # 4 image tokens, 12 words and the state of the tiny policy


@pytest.fixture(scope="module")
def data():
    return collect(make_observations(12), "random observations", frames=8, held_out=4)


def carried_out(loaded, data, *steps, **options):
    recipe = parse_recipe({"name": "test", "steps": list(steps)})
    return carry_out(recipe, *loaded, data, lambda *_: None, **options)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
def test_each_slice_gets_a_grid_of_its_own_and_errs_half_a_step_at_most(bits, axis):
    rng = np.random.default_rng(0)
    # channels far from zero and tokens of other sizes, as keys and values have
    x = (rng.normal(size=(2, 1, 3, 11, 6)) * rng.uniform(0.1, 5, (11, 1)) + rng.normal(size=6) * 20).astype(np.float32)
    grid = Grid(bits, axis)
    codes, step, low = grid.store(torch.from_numpy(x))
    assert codes.dtype == torch.uint8 and codes.shape[-1] * 8 == 6 * bits
    got = grid.load(codes, step, low).numpy()
    spread = x.max(axis, keepdims=True).astype(np.float64) - x.min(axis, keepdims=True)
    # half a step, and what float16 takes from the grid's beginning and its step
    limit = spread / (2**bits - 1) / 2 + 2.0**-10 * (np.abs(x).max(axis, keepdims=True) + spread)
    assert (np.abs(got - x) <= limit).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_slices_that_never_vary_or_are_tiny_stay_finite_and_right(bits):
    x = torch.cat([torch.full((1, 1, 1, 5, 4), 3.0), torch.zeros(1, 1, 1, 5, 4), torch.full((1, 1, 1, 5, 4), 1e-9)], 1)
    x[0, 2, 0, 0, 0] = 2e-9
    grid = Grid(bits, TOKENS)
    np.testing.assert_allclose(grid.load(*grid.store(x)), x, atol=1e-7)


@pytest.mark.parametrize("step", [
    KVCache(8), KVCache(4), KVCache(4, "channel"), KVCache(4, salient=0.25), KVCache(4, "channel", 0.5),
], ids=str)  # fmt: skip
def test_the_shapes_told_are_those_that_cross(loaded, step):
    policy = loaded[0]
    plain = next(stage for stage in policy.stages() if stage.name == "prefix").outputs
    cache = PrefixCache(*(torch.rand(spec.shape) for spec in plain))
    store, load = CacheStore(step, LENGTH), CacheLoad(step, LENGTH)
    crossing = store(*cache, torch.rand(1, LENGTH))
    specs = store.tensors(plain)
    assert len({spec.name for spec in specs}) == len(specs) == len(crossing)
    for spec, tensor in zip(specs, crossing):
        assert spec.shape == tuple(tensor.shape) and spec.dtype == str(tensor.dtype).removeprefix("torch.")
    keys, values, *rest = load(*crossing)
    back = torch.stack(keys), torch.stack(values), *rest
    assert [tensor.shape for tensor in back] == [tensor.shape for tensor in cache]


def test_the_tokens_that_are_looked_at_most_lose_least():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 3, 2, LENGTH, 8)
    cache = PrefixCache(keys, values, torch.rand(3, LENGTH), None, None)
    looks = torch.rand(3, LENGTH)
    step = KVCache(4, salient=0.25)
    count = step.salient_tokens(LENGTH)
    assert count == 4
    *loaded, mask, _, _ = CacheLoad(step, LENGTH)(*CacheStore(step, LENGTH)(*cache, looks))
    keys, values = map(torch.stack, loaded)
    for b in range(3):
        order = np.argsort(-looks[b].numpy(), kind="stable")
        np.testing.assert_array_equal(mask[b], cache.mask[b][order])
        for ours, theirs in ((keys, cache.keys), (values, cache.values)):
            error = (ours[:, b] - theirs[:, b][:, :, order]).abs().amax((0, 1, 3))
            assert error[:count].max() < 0.02 < 0.1 < error[count:].max()


def test_columns_of_the_attention_are_those_of_the_whole_matrix():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 37, 8, dtype=torch.float64), torch.randn(2, 2, 37, 8, dtype=torch.float64)
    bias, weight = torch.randn(2, 1, 37, 37, dtype=torch.float64), torch.rand(2, 37, dtype=torch.float64)
    scores = torch.einsum("bhtd,bhpd->bhtp", q, k.repeat_interleave(2, 1)) / 8**0.5 + bias
    want = torch.einsum("bhtp,bt->bhp", scores.softmax(-1), weight)
    np.testing.assert_allclose(attention_weights(q, k, bias), scores.softmax(-1), atol=1e-12)
    for rows in (1, 10, 37, 64):
        np.testing.assert_allclose(attention_columns(q, k, bias, weight, rows), want, atol=1e-12)


@pytest.mark.parametrize("steps", [
    [{"kv_cache": {}}], [{"kv_cache": {"bits": 4, "values": "channel", "salient": 0.3}}],
    [{"prune_tokens": {"keep": 0.5, "after": 1}}, {"kv_cache": {"bits": 4, "salient": 0.2}}],
], ids=["8", "salient", "fewer tokens"])  # fmt: skip
def test_the_files_compute_what_the_policy_computes_in_pytorch(loaded, data, tmp_path, steps):
    from vla_edge.engine.backends import StageInterface, onnxruntime
    from vla_edge.engine.export import export_stage

    done = carried_out(loaded, data, *steps)
    ours = Runner.from_policy(done.policy, loaded[1])
    crossing = dict(ours.stages)
    for stage in done.policy.stages():
        if stage.name not in ("prefix", "denoise"):
            continue
        file = export_stage(stage, {}, tmp_path / f"{stage.name}.onnx")
        interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        crossing[stage.name] = onnxruntime.load(file, interface)
    engine = Runner(loaded[1].spec, loaded[1].tokenizer_path, crossing)
    for observation in data.held_out:
        ours.infer(observation)
        engine.infer(observation)
        for spec in crossing["prefix"].interface.outputs:
            a, b = ours._loop.buffers[spec.name], engine._loop.buffers[spec.name]
            assert a.dtype == b.dtype == spec.dtype and a.nbytes == b.nbytes
            # a number between two points of a grid may fall either way
            assert (np.abs(a.astype(float) - b.astype(float)) > 2e-3).mean() < 0.02, spec.name
        difference = ours.infer(observation).chunk.positions - engine.infer(observation).chunk.positions
        assert np.abs(difference).mean() < 2e-3


def test_fewer_bits_lose_more_and_salient_tokens_win_some_back(loaded, data):
    reference = Subject(copy.deepcopy(loaded[0]), loaded[1]).runner

    def error(**options) -> float:
        runner = Runner.from_policy(carried_out(loaded, data, {"kv_cache": options}).policy, loaded[1])
        chunks = [(r.infer(o).chunk.positions for r in (runner, reference)) for o in make_observations(6, seed=5)]
        return float(np.mean([np.abs(a - b).mean() for a, b in chunks]))

    eight, four, half = error(bits=8), error(bits=4), error(bits=4, salient=0.6)
    assert 0 < 4 * eight < four and half < 0.9 * four


def test_layers_are_compressed_beside_the_cache_and_the_policy_itself_stays(loaded, data):
    done = carried_out(
        loaded, data, {"quantize": {"targets": ["*"], "activations": "int8"}}, {"kv_cache": {"bits": 8}}
    )
    assert {layer.precision for layer in done.layers.values()} == {"int8"}
    assert loaded[0].prefix.store is None and loaded[0].denoise.load is None
    sizes = [sum(s.zeros().nbytes for s in p.stages()[1].outputs) for p in (loaded[0], done.policy)]
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"kv_cache": {"bits": 3}}], "bits is 3, allowed is 8, 4"),
        ([{"kv_cache": {"values": "head"}}], "allowed is token, channel"),
        ([{"kv_cache": {"bits": 8, "salient": 0.2}}], "0 where all tokens get 8 bits"),
        ([{"kv_cache": {"bits": 4, "salient": 0.01}}], "0 of 17 tokens; at least one must be salient"),
        ([{"kv_cache": {"bits": 4, "salient": 0.99}}], "17 of 17 tokens; at least one must be salient, and one not"),
        ([{"kv_cache": {}}, {"kv_cache": {"bits": 4}}], "there twice"),
        ([{"kv_cache": {}}, {"finetune": {"steps": 1}}], "put it before kv_cache"),
        ([{"kv_cache": {"bit": 4}}], "did you mean 'bits'"),
    ],
)
def test_what_cannot_be_is_an_error_before_any_work(loaded, data, tmp_path, steps, said):
    with pytest.raises(RecipeError, match=said):
        carried_out(loaded, data, *steps, work=tmp_path)
