"""An operator takes over and hands back without a bump, within every limit, and it is known when."""

import numpy as np
import pytest
from rig import MS, Rig

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlError
from vla_edge.control.modes import Mode
from vla_edge.control.screening import RejectedChunk


def following(seconds=0.5):
    rig = Rig()
    rig.send(np.minimum(np.cumsum(np.full((32, 15), 0.02), axis=0), 0.4), age=0.0)
    rig.run(seconds)
    assert rig.kernel.mode is Mode.FOLLOW
    return rig


def operate(rig, seconds, motion):
    """Commands at 50 Hz; `motion` of seconds since the start gives (15,) rad."""
    start = rig.now
    for _ in range(round(seconds * 50)):
        rig.kernel.operate(motion((rig.now - start) * 1e-9), rig.now)
        rig.run(0.02)


def test_a_take_over_and_a_hand_back_are_smooth_and_stamped():
    rig = following()
    where, before = rig.path[-1], rig.now
    operate(rig, 1.0, lambda t: where + 0.1 * np.sin(2 * np.pi * t / 2))
    assert rig.kernel.mode is Mode.OPERATOR and rig.kernel.counters.interventions == 1
    assert rig.kernel.operator.began_ns == pytest.approx(before, abs=2 * MS) and rig.kernel.operator.ended_ns == 0
    rig.kernel.hand_back()
    assert rig.kernel.mode is Mode.HOLD
    assert rig.kernel.operator.ended_ns == pytest.approx(rig.now, abs=2 * MS)
    rig.run(0.3)
    rig.send(np.tile(rig.measured + 0.05, (32, 1)), age=0.1)
    assert rig.kernel.mode is Mode.FOLLOW
    rig.run(0.8)
    rig.judge()
    # No step beyond what the motion itself makes: nothing jumped when hands changed.
    assert np.abs(np.diff(rig.path, axis=0)).max() < 2e-3


def test_the_operator_is_followed_closely():
    rig = following()
    where = rig.path[-1]
    operate(rig, 2.0, lambda t: where + 0.2 * (1 - np.cos(np.pi * t)) / 2)
    rig.run(0.1)
    rig.judge()
    np.testing.assert_allclose(rig.path[-1], where + 0.2 * (1 - np.cos(np.pi * 1.98)) / 2, atol=0.01)


def test_silence_hands_back():
    rig = following()
    rig.kernel.operate(rig.measured, rig.now)
    rig.run(0.29)
    assert rig.kernel.mode is Mode.OPERATOR
    rig.run(0.03)
    assert rig.kernel.mode is Mode.HOLD and "silent" in rig.kernel.reason
    rig.run(0.2)
    rig.judge()


def test_chunks_are_refused_meanwhile_and_so_are_those_that_answer_an_observation_of_it():
    rig = following()
    rig.kernel.operate(rig.measured, rig.now)
    with pytest.raises(RejectedChunk) as refused:
        rig.send(np.tile(rig.measured, (32, 1)), age=0.1)
    assert refused.value.reason == "operator"
    rig.run(0.1)
    rig.kernel.hand_back()
    rig.run(0.05)
    with pytest.raises(RejectedChunk) as refused:
        rig.send(np.tile(rig.measured, (32, 1)), age=0.1)
    assert refused.value.reason == "order"
    rig.send(np.tile(rig.measured, (32, 1)), age=0.04)


def test_joints_that_the_operator_does_not_name_stay():
    rig = following(0.3)
    rig.kernel.hold()
    rig.run(0.5)
    rig.kernel.resume()
    where, target = rig.path[-1], np.full(15, np.nan)
    target[2] = where[2] + 0.1
    for _ in range(20):
        rig.kernel.operate(target, rig.now)
        rig.run(0.05)
    rig.judge()
    np.testing.assert_allclose(np.delete(rig.path[-1], 2), np.delete(where, 2), atol=1e-6)
    assert rig.path[-1, 2] == pytest.approx(where[2] + 0.1, abs=1e-4)


def test_an_operator_far_away_held_faulted_or_infinite_is_refused_and_counted():
    rig = following()
    with pytest.raises(ControlError, match="max_first_step"):
        rig.kernel.operate(rig.measured + 0.6, rig.now)
    with pytest.raises(ControlError, match="finite"):
        rig.kernel.operate(np.full(15, np.inf), rig.now)
    rig.kernel.hold()
    with pytest.raises(ControlError, match="held"):
        rig.kernel.operate(rig.measured, rig.now)
    rig.kernel.resume()
    rig.kernel.emergency_stop(True)
    with pytest.raises(ControlError, match="FAULT"):
        rig.kernel.operate(rig.measured, rig.now)
    assert rig.kernel.counters.operator_refused == 4 and rig.kernel.counters.interventions == 0


@pytest.mark.parametrize("stop", ["emergency_stop", "joints"])
def test_what_stops_the_robot_stops_the_operator(stop):
    rig = following()
    operate(rig, 0.2, lambda t: np.full(15, 0.3))
    if stop == "emergency_stop":
        rig.kernel.emergency_stop(True)
    else:
        rig.joints_every = 0
        rig.run(0.06)
    assert rig.kernel.mode is Mode.FAULT and rig.kernel.operator.ended_ns > 0
    rig.run(0.3)
    rig.judge()


def test_speed_scale_slows_the_operator_down_too():
    rig = following()
    rig.kernel.set_speed_scale(0.1)
    rig.run(0.6)
    start = rig.path[-1].copy()
    operate(rig, 0.5, lambda t: start + 0.4)
    rig.judge()
    assert np.abs(np.array(rig.velocities)[-300:]).max() <= 0.3
    rig.kernel.set_speed_scale(0.0)
    operate(rig, 1.0, lambda t: start + 0.4)
    assert np.abs(rig.velocities[-1]).max() < 1e-9


def test_wild_operators_do_not_leave_the_limits():
    rng, rig = np.random.default_rng(0), Rig(ControlConfig(start_ramp=0.0, max_first_step=7.0))
    rig.kernel.operate(rig.measured, rig.now)
    for _ in range(150):
        rig.kernel.operate(rng.normal(0, 10.0 ** rng.integers(-3, 4), 15), rig.now)
        rig.run(float(rng.choice([0.001, 0.005, 0.03])))
    rig.judge()
