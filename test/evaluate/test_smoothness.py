from __future__ import annotations

import math

import numpy as np
import pytest

from vla_edge.evaluate.smoothness import Smoothness, SmoothnessSummary
from vla_edge.types import ActionChunk

PERIOD = 0.002


def chunk(stamp_ns: int, offset: float) -> ActionChunk:
    """Two joints at 1 rad/s of absolute time, `offset` rad away."""
    times = stamp_ns / 1e9 + 0.05 * np.arange(1, 11)
    return ActionChunk(stamp_ns, ("a", "b"), np.stack([times + offset, np.zeros(10)], axis=1), 0.05)


def test_a_splice_without_blending_shows_its_whole_step_in_plan_and_command():
    smoothness, first, second = Smoothness(PERIOD), chunk(0, 0.0), chunk(100_000_000, 0.03)
    for tick in range(200):
        if tick == 100:
            smoothness.switch(first, second, 200_000_000)
        smoothness.add(np.array([tick * PERIOD + (0.03 if tick >= 100 else 0.0), 0.0]))
    found = smoothness.result()
    assert found.plan_steps == pytest.approx((0.03,)) and found.command_steps == pytest.approx((0.03,))
    assert found.jerk_rms > 0.0


def test_a_smooth_command_has_no_step_however_far_the_plans_are_apart():
    smoothness = Smoothness(PERIOD)
    for tick in range(200):
        if tick == 100:
            smoothness.switch(chunk(0, 0.0), chunk(100_000_000, 0.2), 200_000_000)
        smoothness.add(np.array([0.5 * tick * PERIOD, 0.0]))
    found = smoothness.result()
    assert found.plan_steps == pytest.approx((0.2,)) and found.command_steps[0] < 1e-12


def test_jerk_is_that_of_the_motion():
    smoothness, rate = Smoothness(PERIOD), 7.0
    time = PERIOD * np.arange(2000)
    for position in np.sin(rate * time):
        smoothness.add(np.array([position]))
    assert smoothness.result().jerk_rms == pytest.approx(rate**3 / math.sqrt(2), rel=0.02)


def test_a_chunk_after_one_that_ran_out_is_no_boundary_and_nothing_gives_nan():
    smoothness = Smoothness(PERIOD)
    smoothness.switch(None, chunk(0, 0.0), 100_000_000)
    smoothness.switch(chunk(0, 0.0), chunk(600_000_000, 0.5), 700_000_000)
    assert smoothness.result().plan_steps == ()
    summary = SmoothnessSummary.of([smoothness.result()])
    assert summary.boundaries == 0 and math.isnan(summary.plan_step_p99) and math.isnan(summary.jerk_rms)


def test_a_step_that_was_moved_into_the_chunk_is_found():
    first, second = chunk(0, 0.0), chunk(100_000_000, 0.0)
    moved = second.positions.copy()
    moved[6:] += 0.04
    smoothness = Smoothness(PERIOD)
    smoothness.switch(first, ActionChunk(second.stamp_ns, second.joint_names, moved, second.dt), 200_000_000)
    found = smoothness.result()
    assert found.plan_steps == pytest.approx((0.0,), abs=1e-9) and found.departures == pytest.approx((0.04,))
