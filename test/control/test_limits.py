"""The limiter lets nothing out of its limits, and changes nothing that is inside them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_edge.control.limits import Limiter

PERIOD = 1e-3


def make(lower=-1.0, upper=1.0, velocity=3.0, acceleration=30.0, jerk=3000.0, joints=3, period=PERIOD):
    limits = [np.full(joints, value) for value in (lower, upper, velocity, acceleration, jerk)]
    return Limiter(*limits, period, 0.02)


def drive(limiter, reference):
    path = [limiter.position.copy()] * 4
    before, hits = limiter.position.copy(), 0
    for after in reference:
        hits += limiter.step(before, after)
        path.append(limiter.position.copy())
        before = after
    return np.array(path), hits


def assert_inside(limiter, path):
    velocity = np.diff(path, axis=0) / limiter.period
    acceleration = np.diff(velocity, axis=0) / limiter.period
    jerk = np.diff(acceleration, axis=0) / limiter.period
    assert (path >= limiter.lower).all() and (path <= limiter.upper).all()
    assert (np.abs(velocity) <= limiter.velocity_limit).all()
    assert (np.abs(acceleration) <= limiter.acceleration_limit).all()
    assert (np.abs(jerk) <= limiter.jerk_limit).all()


def test_a_reference_inside_the_limits_passes_through_unchanged():
    limiter = make()
    t = np.arange(2000)[:, None] * PERIOD
    # A cubed wave begins at rest: no velocity, acceleration or jerk at once.
    reference = 0.3 * np.sin(2 * np.pi * t * np.array([0.3, 0.4, 0.6])) ** 3
    path, hits = drive(limiter, reference[1:])
    assert hits == 0
    np.testing.assert_allclose(path[4:], reference[1:], atol=1e-12)


def test_a_reference_that_the_limits_cut_is_met_again_and_then_followed_exactly():
    limiter = make()
    t = np.arange(1000)[:, None] * PERIOD
    # It begins with 9 rad/s^2 at once, three times the jerk limit's worth.
    reference = 0.2 * (1 - np.cos(2 * np.pi * t * np.array([0.5, 1.0, 1.5])))
    path, hits = drive(limiter, reference[1:])
    assert_inside(limiter, path)
    assert 0 < hits < 200
    assert np.abs(path[4:] - reference[1:]).max() < 5e-4
    np.testing.assert_allclose(path[204:], reference[201:], atol=1e-12)


@pytest.mark.parametrize("jerk", [1500.0, 3000.0, 30000.0])
def test_a_step_is_reached_without_overshoot_and_nearly_as_fast_as_physics_allows(jerk):
    limiter = make(joints=1, jerk=jerk)
    path, _ = drive(limiter, np.full((2000, 1), 0.6))
    assert_inside(limiter, path)
    assert path.max() <= 0.6 + 1e-9
    arrived = np.argmax(path[:, 0] > 0.599)
    fastest = 0.6 / 3.0 + 3.0 / 30.0 + 30.0 / jerk
    assert arrived * PERIOD < 1.2 * fastest


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_a_joint_sent_through_its_limit_stops_at_it(side):
    limiter = make(joints=1)
    path, hits = drive(limiter, np.cumsum(np.full((3000, 1), side * 2.5 * PERIOD), axis=0))
    assert_inside(limiter, path)
    assert hits > 0
    assert path[-1, 0] * side == pytest.approx(1.0, abs=1e-3)


def test_a_lowered_velocity_limit_is_reached_within_the_acceleration_limit():
    limiter = make(joints=1)
    reference = np.cumsum(np.full((200, 1), 2.9 * PERIOD), axis=0)
    path, _ = drive(limiter, reference)
    limiter.set_velocity_fraction(0.1)
    more = [path]
    before = reference[-1]
    for _ in range(200):
        after = before + 2.9 * PERIOD
        limiter.step(before, after)
        more.append(limiter.position[None].copy())
        before = after
    path = np.concatenate(more)
    assert_inside(limiter, path)
    assert abs(path[-1, 0] - path[-2, 0]) / PERIOD <= 0.3


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    velocity=st.floats(0.05, 40.0),
    acceleration=st.floats(0.5, 500.0),
    jerk_time=st.floats(1e-3, 0.5),
    room=st.floats(1e-3, 3.0),
    scale=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 1e3, 1e9]),
    hold=st.integers(1, 60),
    period=st.sampled_from([5e-4, 1e-3, 2e-3]),
)
def test_no_reference_however_wild_gets_a_command_outside_the_limits(
    seed, velocity, acceleration, jerk_time, room, scale, hold, period
):
    rng = np.random.default_rng(seed)
    limiter = make(-room, room, velocity, acceleration, acceleration / jerk_time, period=period)
    limiter.restart(rng.uniform(-room, room, 3))
    reference = np.repeat(rng.normal(0, scale, (400 // hold + 1, 3)), hold, axis=0)
    path, _ = drive(limiter, reference)
    assert_inside(limiter, path)
