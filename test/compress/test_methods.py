"""AWQ, GPTQ, SmoothQuant: each is held to the error it promises to lower, on data with the outliers it is made for."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_subject import COLUMNS, ROWS

from vla_edge.compress.quantize.awq import clipped_steps, search_scale
from vla_edge.compress.quantize.formats import FP8, INT4, INT8
from vla_edge.compress.quantize.gptq import gptq
from vla_edge.compress.quantize.rtn import grid_steps, round_on_grid, round_to_nearest
from vla_edge.compress.quantize.smoothquant import best_smoothing, smoothing_scale
from vla_edge.compress.statistics import BLOCK, TOGETHER, InputStatistics, output_error, rounded_output_error


def error(quantized, weight, inputs) -> float:
    """Of the output, straight from the data."""
    return float(np.square(inputs.astype(np.float64) @ (quantized.dequantize() - weight).T).sum(1).mean())


def test_moments_of_a_stream_are_those_of_the_whole(statistics, inputs):
    assert statistics.count == len(inputs)
    np.testing.assert_allclose(statistics.mean, inputs.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(statistics.mean_magnitude, np.abs(inputs).mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.second_moment, inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(statistics.energy, np.square(inputs, dtype=float).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(statistics.largest, np.abs(inputs).max(0))
    np.testing.assert_array_equal([statistics.low, statistics.high], [inputs.min(0), inputs.max(0)])
    light = InputStatistics(products=False)
    light.update(inputs)
    np.testing.assert_allclose(light.scaled(np.full(COLUMNS, 2.0)).energy, 4 * statistics.energy, rtol=1e-5)
    with pytest.raises(ValueError, match="without products"):
        _ = light.second_moment
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(np.full((1, COLUMNS), np.nan))


@pytest.mark.parametrize("weighed", [False, True])
def test_vectors_that_come_one_by_one_count_whenever_they_are_asked_for(weighed):
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(2 * TOGETHER + 9, 24)).astype(np.float32), rng.uniform(0, 2, 2 * TOGETHER + 9)
    weights = weights if weighed else np.ones(len(rows))
    statistics, buffer, begin = InputStatistics(), np.empty((TOGETHER + 3, 24), np.float32), 0
    for count in (1, 3, TOGETHER + 3, 1, 1, 0, TOGETHER - 1, 1):
        buffer[:count] = rows[begin : begin + count]  # written to again by the next
        statistics.update(buffer[:count], weights[begin : begin + count] if weighed else None)
        begin += count
        seen = slice(0, begin)
        expected = rows[seen].T.astype(float) @ (rows[seen] * weights[seen, None]) / weights[seen].sum()
        np.testing.assert_allclose(statistics.second_moment, expected, rtol=1e-4, atol=1e-5)
    assert statistics.count == begin == len(rows)
    np.testing.assert_allclose(statistics.scaled(np.full(24, 2.0)).second_moment, 4 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [None, np.linspace(0.5, 3, 2 * BLOCK + 40, dtype=np.float32)])
def test_rows_of_a_second_moment_are_those_of_the_data(factor):
    inputs = np.random.default_rng(4).normal(size=(60, 2 * BLOCK + 40)).astype(np.float32)
    statistics = InputStatistics()
    statistics.update(inputs)
    if factor is not None:
        inputs, statistics = inputs * factor, statistics.scaled(factor)
    wanted, found = inputs.T.astype(float) @ inputs / len(inputs), statistics.moment_by_rows
    places = np.random.default_rng(5).permutation(len(wanted))[:100]
    np.testing.assert_allclose(found[places], wanted[places], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[BLOCK - 5 : BLOCK + 5], wanted[BLOCK - 5 : BLOCK + 5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.diagonal(), wanted.diagonal(), rtol=1e-4)
    np.testing.assert_allclose(statistics.second_moment, wanted, rtol=1e-4, atol=1e-5)


def test_the_moments_of_rescaled_vectors_need_no_second_pass(statistics, inputs):
    factor = np.random.default_rng(2).uniform(0.1, 4, COLUMNS).astype(np.float32)
    again = InputStatistics()
    again.update(inputs * factor)
    scaled = statistics.scaled(factor)
    np.testing.assert_allclose(scaled.second_moment, again.second_moment, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(scaled.largest, again.largest, rtol=1e-6)


def test_the_error_from_the_second_moment_is_the_error_over_the_data(statistics, weight, inputs):
    quantized = round_to_nearest(weight, INT4, 32)
    ours = output_error(quantized.dequantize() - weight, statistics.second_moment)
    assert ours == pytest.approx(error(quantized, weight, inputs), rel=1e-3)


@pytest.mark.parametrize("grid", (INT4, INT8, FP8), ids=lambda grid: grid.name)
@pytest.mark.parametrize("group", (None, 32))
def test_gptq_errs_less_than_rounding_and_stays_on_the_same_grid(weight, statistics, inputs, grid, group):
    nearest = round_to_nearest(weight, grid, group)
    found = gptq(weight, statistics.second_moment, grid, group)
    assert error(found, weight, inputs) < 0.8 * error(nearest, weight, inputs)
    np.testing.assert_array_equal(found.scales, nearest.scales)


def test_gptq_without_correlation_is_rounding(weight):
    found = gptq(weight, np.eye(COLUMNS), INT4, 32)
    np.testing.assert_array_equal(found.values, round_to_nearest(weight, INT4, 32).values)


def test_gptq_beats_greedy_rounding_by_the_book(statistics, weight, monkeypatch):
    """Against the definition: quantize a column, then give the rest the least-squares correction (OBQ's update)."""
    monkeypatch.setattr("vla_edge.compress.quantize.gptq.BLOCK", 40)
    columns = COLUMNS
    moment = statistics.second_moment[:columns, :columns].astype(np.float64)
    moment += 0.01 * np.diag(moment).mean() * np.eye(columns)
    scales = grid_steps(weight[:, :columns], INT4, None)
    left, expected = weight[:, :columns].astype(np.float64), np.zeros((ROWS, columns))
    for i in range(columns):
        rounded = np.clip(np.rint(left[:, i] / scales), -8, 7)
        expected[:, i] = rounded
        inverse = np.linalg.inv(moment[i:, i:])
        left[:, i:] -= np.outer((left[:, i] - rounded * scales) / inverse[0, 0], inverse[0])
    undamped = statistics.second_moment[:columns, :columns]
    found = gptq(weight[:, :columns], undamped, INT4, None, damping=0.01, activation_order=False)
    assert (found.values != expected).mean() < 0.01  # float32 may decide a tie the other way


def test_gptq_takes_inputs_that_never_speak_and_moments_of_low_rank(weight):
    moment = np.zeros((COLUMNS, COLUMNS))
    moment[0, 0] = 1.0
    found = gptq(weight, moment, INT4, 32, damping=1e-9)
    np.testing.assert_array_equal(found.values, round_to_nearest(weight, INT4, 32).values)
    assert gptq(weight, 0 * moment, INT4, 32).values.any()


def test_clipping_never_errs_more_within_its_groups(weight, statistics):
    heavy = weight.copy()
    heavy[:, ::40] *= 12
    moment = statistics.second_moment
    blocks = np.kron(np.eye(COLUMNS // 32), np.ones((32, 32))) * moment
    whole = output_error(round_to_nearest(heavy, INT4, 32).dequantize() - heavy, blocks)
    clipped = round_on_grid(heavy, clipped_steps(heavy, moment, INT4, 32), INT4, 32)
    assert output_error(clipped.dequantize() - heavy, blocks) < 0.95 * whole
    assert (clipped.scales <= grid_steps(heavy, INT4, 32).astype(np.float16)).all()  # as they are stored


def test_awq_finds_a_scale_that_protects_what_large_inputs_meet(weight, statistics, inputs):
    def quantize(w):
        return round_to_nearest(w, INT4, 32)

    scale = search_scale(statistics, [weight], [quantize])
    plain, scaled = quantize(weight), quantize(weight * scale)
    difference = scaled.dequantize() / scale - weight
    assert output_error(difference, statistics.second_moment) < 0.7 * error(plain, weight, inputs)
    large = statistics.mean_magnitude > 5 * np.median(statistics.mean_magnitude)
    assert scale[large].min() > np.median(scale[~large])


@pytest.mark.parametrize("weighed", [False, True])
def test_products_in_bfloat16_tell_the_same_errors_apart(weight, inputs, weighed):
    """To the half percent that its rounding leaves of every product, which sums of thousands average away."""
    exact, rounded = InputStatistics(), InputStatistics(bfloat16=True)
    weights = np.linspace(0.5, 1.5, len(inputs)).astype(np.float32) if weighed else None
    for seen in (exact, rounded):
        seen.update(inputs, weights)
    moment, other = exact.second_moment, rounded.second_moment
    size = np.sqrt(np.outer(moment.diagonal(), moment.diagonal()))
    assert 0 < np.abs(other - moment).max() and (np.abs(other - moment) <= 0.01 * size).all()
    np.testing.assert_array_equal(rounded.low, exact.low)  # nothing else is rounded
    np.testing.assert_array_equal(rounded.mean_magnitude, exact.mean_magnitude)
    for bits in (INT4, INT8):
        difference = round_to_nearest(weight, bits).dequantize() - weight
        assert rounded_output_error(other)(difference) == pytest.approx(output_error(difference, moment), rel=0.01)

    def quantize(weight):
        return round_to_nearest(weight, INT4, 16)

    scales = [search_scale(seen, [weight], [quantize]) for seen in (exact, rounded)]
    errors = [output_error(quantize(weight * scale).dequantize() / scale - weight, moment) for scale in scales]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_smoothing_follows_the_paper_and_auto_is_never_worse_than_a_fixed_strength(weight, statistics, inputs):
    half = smoothing_scale(statistics, [weight], 0.5)
    np.testing.assert_allclose(half, np.sqrt(np.abs(inputs).max(0) / np.abs(weight).max(0)), rtol=1e-5)

    def whole_error(scale):
        smooth, moved = inputs / scale, weight * scale
        step = 2 * np.abs(smooth).max() / 255
        seen = np.rint(smooth / step) * step
        return np.square(seen @ round_to_nearest(moved, INT8).dequantize().T - inputs @ weight.T).mean()

    best, alpha = best_smoothing(statistics, [weight], [lambda w: round_to_nearest(w, INT8)])
    assert 0 < alpha < 1
    assert whole_error(best) < 0.5 * whole_error(np.ones(COLUMNS, np.float32))
    fixed = [whole_error(smoothing_scale(statistics, [weight], strength)) for strength in (0.3, 0.5, 0.7)]
    assert whole_error(best) < 1.05 * min(fixed)
