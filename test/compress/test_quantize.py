"""Rounding to integers, held to float64 arithmetic and to numpy's own statistics."""

from __future__ import annotations

import numpy as np
import pytest

from vla_edge.compress.quantize.formats import INT4, INT8, number_format
from vla_edge.compress.quantize.ranges import CALIBRATORS, RangeObserver, calibrate
from vla_edge.compress.quantize.rtn import fitting_group, round_to_nearest
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, QuantizedWeight, weight_fractions

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("grid", "group"), [(INT8, None), (INT4, 32), (INT4, None), (INT8, 16)])
def test_every_weight_lies_within_half_a_step(grid, group):
    weight = RNG.normal(size=(24, 96)).astype(np.float32) * RNG.lognormal(size=(24, 1)).astype(np.float32)
    found = round_to_nearest(weight, grid, group)
    step = np.repeat(np.reshape(found.steps, (24, -1)).astype(np.float64), group or 96, axis=1)
    assert (np.abs(found.dequantize().astype(np.float64) - weight) <= step / 2 * (1 + 1e-2)).all()
    # each group reaches an end of the grid
    grouped = found.values.astype(int).reshape(24, -1, group or 96)
    assert ((grouped.max(-1) == grid.largest) | (grouped.min(-1) == grid.smallest)).all()
    assert grouped.min() == (-8 if grid is INT4 else -127)


def test_a_reduced_range_keeps_two_products_within_16_bits():
    weight = RNG.normal(size=(24, 96)).astype(np.float32)
    found = round_to_nearest(weight, number_format("int8", reduce_range=True))
    assert found.reduced_range and not round_to_nearest(weight, INT8).reduced_range
    assert 2 * 255 * int(np.abs(found.values.astype(int)).max()) < 2**15
    assert (np.abs(found.dequantize() - weight) <= found.scales[:, None] / 2 * (1 + 1e-5)).all()


def test_a_row_and_a_group_of_zeros_stay_zero():
    weight = RNG.normal(size=(4, 64)).astype(np.float32)
    weight[1] = 0
    weight[2, 32:] = 0
    for found in (round_to_nearest(weight, INT8), round_to_nearest(weight, INT4, 32)):
        assert np.isfinite(found.scales).all() and (found.scales > 0).all()
        assert not found.dequantize()[1].any() and not found.dequantize()[2, 32:].any()


@pytest.mark.parametrize(
    ("columns", "wanted", "got"), [(144, 32, 16), (576, 128, 64), (192, 64, 64), (37, 32, 37), (45, 32, 15), (8, 32, 8)]
)
def test_a_group_that_does_not_divide_gives_way_to_one_that_does(columns, wanted, got):
    assert fitting_group(columns, wanted) == got
    found = round_to_nearest(RNG.normal(size=(3, columns)), INT4, wanted)
    assert found.group_size == got and found.scales.shape == (3, columns // got)


def test_values_outside_their_bits_are_refused():
    with pytest.raises(ValueError, match="within"):
        QuantizedWeight(np.array([[8]]), np.array([1.0]), "int4")
    with pytest.raises(ValueError, match="within -8 to 7"):
        QuantizedWeight(np.array([[-9]]), np.array([1.0]), "int4")
    with pytest.raises(ValueError, match="do not divide"):
        QuantizedWeight(np.zeros((1, 10)), np.ones((1, 2)), "int4", 4)


def test_the_table_of_layers_says_what_each_got():
    weight = RNG.normal(size=(8, 32)).astype(np.float32)
    layer = CompressedLinear(round_to_nearest(weight, INT4, 16), None, None)
    assert layer.describe() == {
        "shape": [8, 32], "weights": "int4", "bytes": 8 * 16 + 8 * 2 * 2, "group_size": 16, "activations": "float32",
    }  # fmt: skip
    eight = CompressedLinear(round_to_nearest(weight, INT8), None, ActivationQuant("dynamic"))
    assert eight.describe() == {"shape": [8, 32], "weights": "int8", "bytes": 288, "activations": "int8-dynamic"}
    half = CompressedLinear(weight.astype(np.float16)[:, :16])
    assert weight_fractions({"a": eight, "b": layer, "c": half}) == {"int8": 0.4, "int4": 0.4, "float16": 0.2}
    assert (layer.nbytes, eight.nbytes, half.nbytes) == (8 * 32 // 2 + 8 * 2 * 2, 8 * 32 + 8 * 4, 8 * 16 * 2)


def test_a_stream_is_counted_like_the_whole():
    chunks = [RNG.normal(size=500) * scale for scale in (1e-3, 0.1, 5.0, 80.0)]
    observer = RangeObserver()
    for chunk in chunks:
        observer.update(chunk)
    everything = np.concatenate(chunks).astype(np.float32)
    assert (observer.low, observer.high) == (everything.min(), everything.max())
    assert observer.counts.sum() == everything.size
    width = observer.centers[1] - observer.centers[0]
    expected, _ = np.histogram(everything, len(observer.counts), (-observer._span, observer._span))
    # doubling merges whole bins, so at most values on an edge fall to the neighbour
    assert np.abs(np.cumsum(expected) - np.cumsum(observer.counts)).max() <= 2
    assert width < 2 * 2 * np.abs(everything).max() / len(observer.counts)


def test_min_max_covers_everything_and_zero_is_exact():
    observer = RangeObserver()
    observer.update(np.array([0.5, 3.0]))
    observer.update(np.array([-1.0]))
    grid = calibrate(observer, "minmax")
    assert grid.scale == pytest.approx(4.0 / 255) and grid.zero_point == round(255 / 4)
    positive = RangeObserver()
    positive.update(np.array([1.0, 2.0]))
    assert calibrate(positive) == ActivationQuant("static", float(np.float32(2 / 255)), 0)


def test_the_tail_calibrator_expects_what_more_of_the_same_data_hold():
    """From 100 updates, ranges that hold for about 1,000; where nothing varies, what was seen is all."""
    rng = np.random.default_rng(3)
    held, wide = 0, []
    for _ in range(40):
        observer = RangeObserver()
        for _ in range(100):
            observer.update(rng.normal(size=200))
        low, high = observer.expected()
        assert low <= observer.low and high >= observer.high
        more = rng.normal(size=(900, 200))
        held += low <= more.min() and more.max() <= high
        wide.append((high - low) / (observer.high - observer.low))
    # the largest of many more values lies beyond what was seen nearly always, and beyond the range half of the time
    assert held >= 8 and np.mean(wide) < 1.4
    grid = calibrate(observer, "tail")
    assert grid.scale * 255 == pytest.approx(high - low, rel=1e-5)
    constant = RangeObserver()
    for _ in range(50):
        constant.update(np.array([-1.0, 2.0]))
    assert calibrate(constant, "tail") == calibrate(constant, "minmax")


def test_percentile_agrees_with_numpy():
    values = RNG.normal(size=200_000)
    observer = RangeObserver()
    for part in np.split(values, 20):
        observer.update(part)
    grid = calibrate(observer, "percentile", 99.0)
    low, high = np.percentile(values, [0.5, 99.5])
    assert grid.scale * 255 == pytest.approx(high - low, rel=0.01)


def test_least_squares_finds_the_best_clipping():
    values = RNG.standard_t(4, size=100_000)
    observer = RangeObserver()
    observer.update(values)

    def error(grid: ActivationQuant) -> float:
        q = np.clip(np.rint(values / grid.scale) + grid.zero_point, 0, 255)
        return float((((q - grid.zero_point) * grid.scale - values) ** 2).mean())

    low, high = values.min(), values.max()
    brute = [
        ActivationQuant("static", (high - low) * clip / 255, round(-low * 255 / (high - low)))
        for clip in np.linspace(0.05, 1, 400)
    ]
    best = min(error(grid) for grid in brute)
    assert best < 0.85 * error(calibrate(observer, "minmax")), "there is something to find"
    assert error(calibrate(observer, "mse")) <= 1.05 * best


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_a_constant_channel_gives_a_usable_grid(calibrator):
    observer = RangeObserver()
    observer.update(np.zeros(10))
    assert calibrate(observer, calibrator).scale > 0
    observer.update(np.full(10, 3.0))
    assert calibrate(observer, calibrator).scale > 0


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        RangeObserver().update(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="no values"):
        calibrate(RangeObserver())
