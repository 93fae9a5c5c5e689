from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from vla_edge.evaluate.metrics import (
    ErrorTable,
    MotionScale,
    Percentiles,
    bootstrap_interval,
    bootstrap_intervals,
    boundary_jump,
    chunk_stamps,
    cosine,
    likeness,
    mcnemar,
    rank_correlation,
    wilson_interval,
)
from vla_edge.evaluate.trajectory import JointTrajectory
from vla_edge.types import ActionChunk


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: Wilson without continuity correction
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_intervals(successes, n, low, high):
    interval = wilson_interval(successes, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_wilson_bounds_solve_its_defining_equation():
    for successes, n, confidence in [(3, 10, 0.9), (285, 300, 0.95), (50, 51, 0.99)]:
        interval = wilson_interval(successes, n, confidence)
        z = {0.9: 1.6448536269514722, 0.95: 1.959963984540054, 0.99: 2.5758293035489004}[confidence]
        for bound in (interval.low, interval.high):
            assert abs(successes / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-12)


def test_wilson_is_whole_at_the_ends_and_refuses_nonsense():
    assert wilson_interval(0, 7).low == 0.0 and wilson_interval(7, 7).high == 1.0
    assert (wilson_interval(0, 0).low, wilson_interval(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="8 successes out of 7"):
        wilson_interval(8, 7)


def _binomial_two_sided(k: int, n: int) -> float:
    """By listing every outcome of n fair coins: the share at least as far from n/2 as k."""
    outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
    return sum(abs(heads - n / 2) >= abs(k - n / 2) for heads in outcomes) / len(outcomes)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 1), (3, 3), (2, 9), (0, 8)])
def test_mcnemar_is_the_exact_test_of_the_discordant_pairs(only_first, only_second):
    first = [True] * only_first + [False] * only_second + [True] * 4 + [False] * 3
    second = [False] * only_first + [True] * only_second + [True] * 4 + [False] * 3
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second, found.both, found.neither) == (only_first, only_second, 4, 3)
    assert found.p_value == pytest.approx(_binomial_two_sided(only_first, only_first + only_second))
    assert found.difference == pytest.approx((only_second - only_first) / len(first))


def test_mcnemar_refuses_results_that_are_no_pairs():
    with pytest.raises(ValueError, match="not pairs"):
        mcnemar([True], [True, False])


def test_mcnemar_stays_finite_for_many_pairs():
    found = mcnemar([True] * 3000 + [False] * 2700, [False] * 3000 + [True] * 2700)
    normal = math.erfc((300 - 1) / math.sqrt(5700) / math.sqrt(2))
    assert found.p_value == pytest.approx(normal, rel=0.02)


def test_bootstrap_agrees_with_the_normal_interval_and_repeats_itself():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap_interval(values) == interval


def test_bootstrap_draws_whole_groups():
    # ten groups of forty equal values know as much as ten values
    levels = np.random.default_rng(1).normal(size=10)
    grouped = bootstrap_interval(np.repeat(levels, 40), np.repeat(np.arange(10), 40))
    single = bootstrap_interval(levels)
    assert (grouped.low, grouped.high) == pytest.approx((single.low, single.high))


def test_bootstrap_weights_count_as_repeated_observations():
    values, weights = np.array([1.0, 2.0, 7.0, 3.0]), np.array([3, 1, 2, 4])
    repeated, groups = np.repeat(values, weights), np.repeat(np.arange(4), weights)
    weighted, plain = bootstrap_interval(values, weights=weights), bootstrap_interval(repeated, groups)
    assert (weighted.low, weighted.high) == pytest.approx((plain.low, plain.high))


def test_errors_are_averaged_over_what_is_known():
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(20, 6, 4))
    frames[rng.random(frames.shape) < 0.3] = np.nan
    frames[3] = np.nan
    table = ErrorTable(6, 4)
    for frame in frames:
        mean, known = table.add(frame)
        assert known == np.isfinite(frame).sum()
        assert math.isnan(mean) if not known else mean == pytest.approx(np.nanmean(np.abs(frame)))
    assert table.mean() == pytest.approx(np.nanmean(np.abs(frames)))
    np.testing.assert_allclose(table.per_joint(), np.nanmean(np.abs(frames), axis=(0, 1)))
    np.testing.assert_allclose(table.per_step(), np.nanmean(np.abs(frames), axis=(0, 2)))
    assert table.count == np.isfinite(frames).sum()


def test_the_motion_scale_is_the_spread_around_the_current_position_whatever_the_offset():
    rng = np.random.default_rng(0)
    motion, current = rng.normal(0.02, 0.1, (50, 8, 3)), rng.normal(0, 1e3, (50, 3))
    scale = MotionScale()
    for frame, position in zip(motion, current):
        scale.add(frame + position, position)
    assert scale.std() == pytest.approx(motion.std(), rel=1e-9)


def test_percentiles_interpolate_between_order_statistics():
    found = Percentiles.of(range(101))
    assert (found.n, found.p50, found.p95, found.p99, found.max, found.mean) == (101, 50.0, 95.0, 99.0, 100.0, 50.0)
    assert Percentiles.of([3.0, 5.0]).p50 == 4.0
    assert Percentiles.of([]).n == 0


def test_a_jump_is_measured_at_the_first_target_of_the_new_chunk_by_name():
    ramp = np.arange(1, 11)[:, None] * np.array([0.1, -0.2])
    old = ActionChunk(0, ("a", "b"), ramp, 0.05)
    # 0.13 s later the old plan is at 2.6 + 1 steps; its rows are named the other way round in the new chunk
    new = ActionChunk(130_000_000, ("b", "a"), np.zeros((4, 2)), 0.05)
    np.testing.assert_allclose(boundary_jump(old, new), [0.72, 0.36])
    assert boundary_jump(old, ActionChunk(10**9, ("a", "b"), np.zeros((4, 2)), 0.05)) is None


def test_chunk_stamps_are_exact_nanoseconds():
    chunk = ActionChunk(1_700_000_000_123_456_789, ("a",), np.zeros((32, 1)), 0.05)
    assert chunk_stamps(chunk).tolist() == [1_700_000_000_123_456_789 + k * 50_000_000 for k in range(1, 33)]


def test_cosine_of_equal_opposite_and_missing_motion():
    a = np.array([[1.0, 2.0], [3.0, -1.0]])
    assert cosine(a, 3 * a) == pytest.approx(1.0)
    assert cosine(a, -a) == pytest.approx(-1.0)
    assert (cosine(a, 0 * a), cosine(0 * a, 0 * a)) == (0.0, 1.0)


def test_likeness_is_the_same_in_shares(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 13)).astype(np.float32)
    whole = likeness(a, b)
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    assert whole[0] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert whole[1] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-12)
    monkeypatch.setattr("vla_edge.evaluate.metrics._SHARE", 10)
    assert likeness(a, b) == pytest.approx(whole, rel=1e-12)
    assert likeness(a, 0 * a) == (0.0, pytest.approx(np.linalg.norm(x)))
    assert np.isnan(likeness(a * np.nan, b)[1])
    for shorter in (a[:1], a[:0]):
        with pytest.raises(ValueError):
            likeness(shorter, b)
        with pytest.raises(ValueError):
            likeness(a, shorter)


def test_a_trajectory_answers_only_for_what_it_knows():
    stamps = np.array([0, 50, 100, 400], np.int64) * 1_000_000
    path = JointTrajectory(("a", "b"), stamps, np.array([[0, 0], [1, 2], [2, 4], [8, 8]], float))
    found = path.at(np.array([-1, 0, 25, 75, 100, 250, 400, 401]) * 1_000_000, ("b", "a"))
    np.testing.assert_array_equal(found[1:5], [[0, 0], [1, 0.5], [3, 1.5], [4, 2]])
    np.testing.assert_array_equal(found[6], [8, 8])
    assert np.isnan(found[[0, 5, 7]]).all()
    assert np.isnan(JointTrajectory((), np.zeros(0), np.zeros((0, 0))).at(np.array([0]), ("a",))).all()


def test_rank_correlation_is_spearman_s():
    rng = np.random.default_rng(0)
    a = rng.normal(size=60).round(1)  # with ties
    b = a + rng.normal(size=60)
    assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(a, a**3) == pytest.approx(1.0)
    assert math.isnan(rank_correlation(a, np.zeros(60))) and math.isnan(rank_correlation([], []))


def test_intervals_of_many_means_are_those_of_each_alone():
    rng = np.random.default_rng(0)
    values, sizes, groups = rng.normal(size=(80, 3)), rng.integers(1, 5, (80, 3)), np.arange(80) // 7
    together = bootstrap_intervals(values * sizes, sizes, groups)
    for column, interval in enumerate(together):
        alone = bootstrap_interval(values[:, column], groups, sizes[:, column])
        assert (interval.low, interval.high) == pytest.approx((alone.low, alone.high), rel=1e-12)


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        found = bootstrap_interval(rng.normal(3.0, 1.0, 60), resamples=400)
        inside += found.low <= 3.0 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_an_interval_of_an_hour_needs_no_more_memory_than_one_of_a_minute():
    import tracemalloc

    peaks = []
    for groups in (20, 1200):
        values = np.ones((groups * 15, 16))
        tracemalloc.start()
        bootstrap_intervals(values, values, np.arange(len(values)) // 15)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 20e6, peaks
