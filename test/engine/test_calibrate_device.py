"""This computer's costs: counted by hand, found by regression, kept whole. Nothing here depends on a time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import nnls

from vla_edge.compress.recipe import load_recipe
from vla_edge.engine.checkpoint_shapes import architecture_of
from vla_edge.engine.calibrate_device import _ordered, device_from, fit_costs, read_calibration
from vla_edge.engine.calibration_blocks import BLOCKS, VARIANTS, Block, block_stage
from vla_edge.engine.cost import LABELS, OWN, PACKED, ROUNDED, SCHEDULING, UNPACKED, WEIGHTS, MeasuredSum, features
from vla_edge.engine.devices import DeviceError
from vla_edge.engine.operations import Attention, Convolution, GroupNorm, Pointwise, Product, StageWork
from vla_edge.engine.plan import predict
from vla_edge.engine.precision import LayerPrecision
from vla_edge.engine.workload import Workload


def calibration(**costs) -> dict:
    return {
        "processor": "test", "measured": "2026-11-25", "cache_bytes": [1e6, 4e6], "read_bytes_per_s": {"1": 1e10}, "memory_gb": 8.0, "host_ms_per_camera": 0.5,
        "seconds_per": {"1": dict.fromkeys(LABELS, 0.0) | costs}, "blocks": {},
    }  # fmt: skip


def test_what_a_call_does_is_counted():
    work = StageWork("vision", 1, "camera", (Product("a", 10, 64, 32), Attention(10, 20, 4, 2, 8), Pointwise(100, 300, 3)))
    # 320 numbers of queries, 320 that come out and 640 of keys and values are copied; 7 kernels of attention
    base = {"attention": 25_600, "scores": 800, "curved": 100, "copied": 300 + 2 * 1280, "kernels": 1 + 7 + 3, "call": 1}

    def counted(precision, caches=(1e6, 4e6), way=PACKED):
        found = features(work, {"a": precision}, caches, way)
        return {name: amount for name, amount in found.items() if amount}

    products = 2 * 10 * 64 * 32
    assert counted(LayerPrecision("float32")) == {**base, "float32": products, "cached": 4 * 64 * 32}
    assert counted(LayerPrecision("float32"), caches=(1e3, 2e3)) == {**base, "float32": products, "loaded": 4 * 64 * 32}
    assert counted(LayerPrecision("float32"), caches=(1e3, 1e4)) == {**base, "float32": products, "shared": 4 * 64 * 32}
    dynamic = LayerPrecision("int8", "int8-dynamic")
    assert counted(dynamic) == {**base, "int8": products, "cached": 64 * 32 + 4 * 32, "rounded": 640}
    # stored in 8 bits and multiplied as floats: unpacked when the file is loaded
    assert counted(LayerPrecision("int8")) == counted(LayerPrecision("float32"))
    packed = LayerPrecision("int4", group=32)
    assert counted(packed) == {**base, "int4": products, "unpacked": 64 * 32, "cached": 64 * 16 + 2 * 64 * 32 // 32}
    assert counted(packed, way=UNPACKED) == counted(LayerPrecision("float32"))
    bytes_ = 64 * 16 + 2 * 64 * 32 // 32
    assert counted(packed, way=ROUNDED) == {**base, "int4 rounded": products, "int4 inputs": 640, "cached": bytes_}
    attended = {"own attention": 25_600, "own scores": 800, "call": 1}
    # what is rounded: inputs, of 4-bit weights in 2 groups a row; and 320 numbers of queries and 640 of keys and values
    inputs = {"own inputs": 640, "own heads": 320 + 640}
    assert counted(packed, way=OWN) == {
        **attended, **inputs, "own int4": products, "own steps": 10 * 2, "own groups": 10 * 2 * 32, "own kernels": 2,
        "cached": bytes_, "curved": 100, "copied": 300, "kernels": 3,
    }  # fmt: skip
    bytes_ = 64 * 32 + 4 * 32
    for eight in (dynamic, LayerPrecision("int8")):  # with norms and sums in passing
        assert counted(eight, way=OWN) == {
            **attended, **inputs, "own int8": products, "own kernels": 5, "cached": bytes_, "own curved": 100,
            "own copied": 300,
        }  # fmt: skip
    static = LayerPrecision("int8", "int8")  # on a grid of the recipe's
    assert counted(static, way=OWN)["int8"] == products
    row = StageWork("decode", 1, "token", (Product("a", 1, 64, 32),))
    found = features(row, {"a": packed}, (1e6, 4e6))
    assert found["int4 row"] == 64 * 32 and not found["int4"] and not found["unpacked"]
    # its weights come in a stream
    assert features(row, {"a": LayerPrecision("float32")}, (1e3, 1e4))["shared row"] == 4 * 64 * 32


def test_a_convolution_is_one_in_float32_and_a_product_of_patches_in_int8():
    work = StageWork("vision", 1, "camera", (Convolution("a", 9, 36, 8, (3, 3), 144), GroupNorm(72)))
    products, base = 2 * 9 * 36 * 8, {"grouped": 72, "call": 1}

    def counted(precision):
        return {name: amount for name, amount in features(work, {"a": precision}, (1e6, 4e6)).items() if amount}

    assert counted(LayerPrecision("float32")) == {**base, "convolved": products, "cached": 4 * 36 * 8, "kernels": 11}
    # of the first dimension 144 numbers become 324, as many as all patches have, and so do they of the second
    patches = {"copied": 2 * 4 * 324, "kernels": 11 + 2 * 4}
    rounded = {"int8": products, "rounded": 9 * 36, "cached": 36 * 8 + 4 * 8}
    assert counted(LayerPrecision("int8", "int8-dynamic")) == {**base, **patches, **rounded}


def test_a_convolution_in_time_goes_through_its_filters_for_every_sixteen_places_and_waits_for_them():
    def counted(rows: int, caches=(1e6, 4e6)) -> dict:
        work = StageWork("denoise", 1, "step", (Convolution("a", rows, 40, 8, (5,), 8 * rows),))
        found = features(work, {"a": LayerPrecision("float32")}, caches)
        return {name: amount for name, amount in found.items() if amount}

    weights = 40 * 8
    assert counted(4) == {"slid": 2 * 4 * weights, "filters": weights, "cached": 4 * weights, "kernels": 1, "call": 1}
    assert [counted(rows)["filters"] for rows in (16, 17, 48)] == [weights, 2 * weights, 3 * weights]
    assert counted(1, (1e2, 1e4))["shared slid"] == counted(4, (1e2, 2e2))["loaded slid"] == 4 * weights


def test_our_kernels_are_only_planned_with_where_they_were_measured_and_something_is_rounded():
    work = StageWork("vision", 1, "camera", (Product("a", 10, 64, 32),))
    costs = dict.fromkeys(LABELS, 0.0) | {"call": 1.0, "int8": 1e-3, "float32": 1e-3, "own int8": 1e-9, "own int4": 1e-9}
    for missing in (None, "own int8", "own int4"):
        model = MeasuredSum({1: costs | ({missing: 0.0} if missing else {})})
        for precision, ours in ((LayerPrecision("int8", "int8-dynamic"), missing is None), (LayerPrecision("float32"), False)):
            seconds = sum(model.call_seconds(work, {"a": precision}, None).values())
            assert (seconds < 1.1) == ours


def test_weights_from_farther_away_cost_no_less():
    costs = dict.fromkeys(LABELS, 0.0) | {"cached": 2.0, "shared row": 3.0, "loaded": 1.0, "loaded slid": 4.0}
    found = _ordered(costs)
    assert [found[name] for name in ("cached", "shared", "loaded", "shared row", "loaded row")] == [2, 2, 2, 3, 3]
    assert [found[name] for name in ("shared slid", "loaded slid")] == [2, 4]


def test_costs_are_the_non_negative_least_squares_that_scipy_finds():
    rng = np.random.default_rng(0)
    rows = rng.uniform(0, 1, (40, 6)) * 10.0 ** rng.integers(0, 9, 6)
    true = np.array([1e-9, 0.0, 3e-7, 2e-5, 0.0, 1e-3])
    seconds = rows @ true * rng.uniform(0.9, 1.1, 40)
    ours = fit_costs(rows, seconds)
    theirs, residual = nnls(rows / seconds[:, None], np.ones(40))
    assert ours.min() >= 0
    assert np.linalg.norm(rows / seconds[:, None] @ ours - 1) == pytest.approx(residual, rel=1e-4)
    assert rows @ ours == pytest.approx(rows @ theirs, rel=0.01)


def test_what_weighs_more_is_met_more_closely():
    rng = np.random.default_rng(3)
    rows, seconds, weights = rng.uniform(0, 1, (40, 6)), rng.uniform(1, 2, 40), rng.uniform(0.1, 3, 40)
    ours = fit_costs(rows, seconds, weights=weights)
    _, residual = nnls(rows * (weights / seconds)[:, None], weights)
    assert np.linalg.norm(weights * (rows @ ours / seconds - 1)) == pytest.approx(residual, rel=1e-4)
    # the unweighted costs are worse by this measure
    assert np.linalg.norm(weights * (rows @ fit_costs(rows, seconds) / seconds - 1)) > 1.02 * residual


def test_no_cost_is_below_the_least_that_is_given():
    rng = np.random.default_rng(2)
    rows = rng.uniform(0, 1, (40, 4)) * [1e9, 1e6, 1e3, 1.0]
    true = np.array([1e-9, 1e-6, 1e-3, 1.0])
    least = np.array([2e-9, 0.5e-6, 0.0, 0.0])
    ours = fit_costs(rows, rows @ true, least)
    # the first lies on its bound, and the rest are the best that go with it
    assert ours[0] == pytest.approx(2e-9)
    relative = rows / (rows @ true)[:, None]
    rest, _ = nnls(relative[:, 1:], 1 - relative[:, 0] * 2e-9)
    assert ours[1:] == pytest.approx(np.maximum(rest, least[1:]), rel=1e-3)


def test_costs_of_a_known_computer_are_found_again_and_predict_a_policy_it_did_not_see(checkpoint):
    rng = np.random.default_rng(1)
    true = dict(zip(LABELS, 10.0 ** rng.uniform(-12, -8, len(LABELS)))) | {"kernels": 3e-6, "call": 2e-5}
    known = MeasuredSum({1: true}, (8e6, 32e6))
    rows, seconds = [], []
    for block in BLOCKS:
        work = block.work()
        for variant in map(VARIANTS.get, block.variants):
            precisions = {product.layer: variant.precision for product in work.products}
            counted = features(work, precisions, (8e6, 32e6), variant.way)
            rows.append([counted[name] for name in LABELS])
            seconds.append(sum(counted[name] * true[name] for name in LABELS))
    found = MeasuredSum({1: dict(zip(LABELS, fit_costs(np.array(rows), np.array(seconds))))}, (8e6, 32e6))
    architecture = architecture_of(checkpoint)
    for recipe in ("fp32", "int8", "int4-rtn"):
        plans = [
            predict(architecture, load_recipe(recipe), replace(device_from(calibration()), measured=model))
            for model in (known, found)
        ]
        for stage in plans[0].stages:
            assert plans[1].stage(stage.name).ms == pytest.approx(stage.ms, rel=0.05), (recipe, stage.name)


def test_memory_gives_no_more_than_it_can():
    work = StageWork("decode", 1, "token", (Product("a", 1, 64, 32),))
    model = MeasuredSum({1: dict.fromkeys(LABELS, 0.0) | {"call": 1.0}}, (1e3, 2e3), {1: 4 * 64 * 32 / 3})
    spent = model.call_seconds(work, {"a": LayerPrecision("float32")}, None)
    assert {label: seconds for label, seconds in spent.items() if seconds} == {SCHEDULING: 1.0, WEIGHTS: 2.0}
    assert sum(replace(model, caches=(1e3, 1e6)).call_seconds(work, {"a": LayerPrecision("float32")}, None).values()) == 1


def test_twice_the_threads_are_taken_where_they_save_enough():
    work = StageWork("vision", 1, "camera", (Product("a", 10, 64, 32),))
    precisions = {"a": LayerPrecision("float32")}

    def spent(second: float) -> float:
        none = dict.fromkeys(LABELS, 0.0)
        model = MeasuredSum({1: none | {"call": 1.0}, 2: none | {"call": second}})
        return sum(model.call_seconds(work, precisions, None).values())

    assert spent(0.7) == 0.7 and spent(0.9) == 1.0


def test_no_block_has_a_product_of_a_shipped_policy():
    from vla_edge.resources import shipped_checkpoint

    architecture = architecture_of(shipped_checkpoint())
    works = architecture.works(Workload.of(architecture))
    shipped = {(p.rows, p.inputs, p.outputs) for work in works for p in work.products}
    assert not shipped & {(p.rows, p.inputs, p.outputs) for block in BLOCKS for p in block.work().products}


@pytest.mark.parametrize("kind", ["encoder", "decoder", "products", "residual", "grouped", "part"])
def test_a_block_counts_the_products_that_its_module_has(kind):
    from torch import nn

    block = Block(kind, 2, 16, 16, 24, 2, 1)
    linear = {name: (m.in_features, m.out_features) for name, m in block_stage(block).module.named_modules()
              if isinstance(m, nn.Linear)}  # fmt: skip
    assert {p.layer: (p.inputs, p.outputs) for p in block.work().products} == linear


@pytest.mark.parametrize(
    "damage", [lambda c: c.pop("seconds_per"), lambda c: c["seconds_per"]["1"].pop("call"),
               lambda c: c["seconds_per"]["1"].update(call=-1.0), lambda c: c.update(memory_gb=0),
               lambda c: c.update(seconds_per={})],
)  # fmt: skip
def test_a_damaged_calibration_is_refused(tmp_path, damage):
    content = calibration()
    damage(content)
    path = tmp_path / "device.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DeviceError, match="measure again with --calibrate"):
        read_calibration(path)
    path.write_text("{")
    with pytest.raises(DeviceError, match="damaged"):
        read_calibration(path)


def test_a_stored_calibration_is_used_without_measuring(tmp_path, monkeypatch):
    from vla_edge.engine import calibrate_device as module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "calibrate", lambda tell: (calibration(call=1e-3, float32=1e-11), {}))
    first = module.local_device()
    assert first.measured.seconds_per[1]["call"] == 1e-3 and first.host_ms_per_camera == 0.5
    monkeypatch.setattr(module, "calibrate", lambda tell: pytest.fail("measured again"))
    assert module.local_device().measured == first.measured
    monkeypatch.setattr(module, "calibrate", lambda tell: (calibration(call=2e-3), {}))
    assert module.local_device(recalibrate=True).measured.seconds_per[1]["call"] == 2e-3
