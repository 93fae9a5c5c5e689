"""Every state has a stop within the limits, as long as was foretold; checked step by step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_edge.control.stopping import jerk_of, plan_stop, reach_of_stops

PERIOD = 1e-3


def play(velocity, acceleration, stop):
    """(N, 4) position, velocity, acceleration, jerk of every step."""
    rows, position, step = [(0.0, velocity, acceleration, 0.0)], 0.0, 0
    while (jerk := jerk_of(stop, step)) is not None:
        acceleration += jerk
        velocity += acceleration
        position += velocity
        rows.append((position, velocity, acceleration, jerk))
        step += 1
    return np.array(rows)


@settings(max_examples=300, deadline=None)
@given(
    velocity=st.floats(-1, 1), acceleration=st.floats(-1, 1), top=st.floats(0.05, 40), most=st.floats(5, 500),
    ramp=st.floats(5e-4, 0.2), small=st.sampled_from([1.0, 1e-2, 1e-5]),
)
def test_a_stop_ends_at_rest_within_its_limits_and_its_bounds(velocity, acceleration, top, most, ramp, small):
    v, a = small * velocity * top * PERIOD, acceleration * most * PERIOD**2
    most, jerk = most * PERIOD**2, most / ramp * PERIOD**3
    stop = plan_stop(v, a, most, jerk)
    way = play(v, a, stop)
    assert np.abs(way[-1, 1]) < 1e-12 and np.abs(way[-1, 2]) < 1e-12
    assert np.abs(way[:, 3]).max() <= jerk * (1 + 1e-8)
    assert np.abs(way[:, 2]).max() <= most * (1 + 1e-8)
    rounding = 1e-12 * len(way)
    assert stop.lowest - rounding <= way[:, 0].min() and way[:, 0].max() <= stop.highest + rounding
    assert np.abs(way[:, 1]).max() <= max(abs(v), stop.fastest) + 1e-15
    per_speed, least, gain = reach_of_stops(top * PERIOD, most, jerk)
    assert max(stop.highest, -stop.lowest) <= per_speed * abs(v) + least
    assert stop.fastest <= abs(v) + gain


@pytest.mark.parametrize(
    "velocity, acceleration", [(3.0, 0.0), (3.0, 30.0), (3.0, -30.0), (-1.0, 12.0), (0.2, -15.0), (0.0, 30.0)]
)
def test_a_stop_is_hardly_longer_than_the_shortest(velocity, acceleration):
    most, jerk = 30.0, 3000.0
    # The shortest in continuous time: let go, then a trapezoid in acceleration; where it brakes already, the rest of it.
    left = velocity + acceleration * abs(acceleration) / (2 * jerk)
    braking = acceleration * left < 0
    peak = min(np.sqrt(jerk * abs(left) + (acceleration**2 if braking else 0.0)), most)
    held = max(abs(left) - (peak**2 - (acceleration**2 if braking else 0.0)) / jerk, 0.0) / peak
    shortest = (2 * peak + (-abs(acceleration) if braking else abs(acceleration))) / jerk + held
    stop = plan_stop(velocity * PERIOD, acceleration * PERIOD**2, most * PERIOD**2, jerk * PERIOD**3)
    assert stop.ends[-1] * PERIOD == pytest.approx(shortest, abs=5 * PERIOD)
