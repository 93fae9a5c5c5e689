"""A robot that is held gives way within its limits; one that is merely touched or lags a little goes on."""

import numpy as np
import pytest
from rig import Rig

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlError
from vla_edge.control.modes import Mode
from vla_edge.control.reflex import Reflex
from vla_edge.control.screening import RejectedChunk
from vla_edge.types import JointState

MS = 1_000_000


class Held(Rig):
    """One joint does not move beyond where something holds it, and its motor says so."""

    joint, stop_at, torque = 3, 0.1, 0.0

    def state(self, stamp=None):
        effort, measured = np.zeros(len(self.names)), self.measured.copy()
        measured[self.joint] = min(measured[self.joint], self.stop_at)
        effort[self.joint] = self.torque
        return JointState(self.now if stamp is None else stamp, self.names, measured, effort=effort)


def config(**changes):
    return ControlConfig(start_ramp=0.0, **{"tracking_error": 0.2, "reflex_time": 0.05, **changes})


def push(rig, seconds=1.5, target=0.6):
    ramp = np.minimum(np.arange(1, 33) * 0.05 / 1.2, 1.0)[:, None]
    rig.send(rig.measured + (target - rig.measured) * ramp, age=0.0)
    rig.run(seconds)


def test_a_joint_that_is_held_ends_in_fault_at_the_measured_position_within_the_limits():
    rig = Held(config())
    push(rig)
    assert rig.kernel.mode is Mode.FAULT
    assert "left_elbow_joint" in rig.kernel.reason and "0.2" in rig.kernel.reason
    assert rig.kernel.counters.reflexes == 1
    rig.judge()
    # It does not push on: the command has come back to where the joint is held.
    assert rig.path[-1, 3] == pytest.approx(0.1, abs=1e-3)
    assert rig.path[:, 3].max() < 0.1 + 0.2 + 0.06


def test_it_gives_way_by_configuration_and_follows_again_once_it_is_free():
    rig = Held(config(reflex_yields=True))
    push(rig)
    rig.judge()
    assert rig.kernel.mode is Mode.HOLD and rig.kernel.counters.reflexes == 1
    assert rig.path[-1, 3] == pytest.approx(0.1, abs=1e-3)
    rig.stop_at = 9.0
    push(rig)
    assert rig.kernel.mode is Mode.FOLLOW
    rig.judge()
    assert rig.path[-1, 3] > 0.5


def test_while_it_gives_way_chunks_are_refused():
    rig = Held(config(reflex_yields=True))
    rig.send(np.tile(rig.measured + 0.3, (32, 1)), age=0.0)
    while not rig.kernel.counters.reflexes:
        rig.tick()
    with pytest.raises(RejectedChunk) as refused:
        rig.send(np.tile(rig.measured, (32, 1)), age=0.0)
    assert refused.value.reason == "yield"


def test_too_much_torque_trips_and_no_torque_measured_does_not():
    rig = Held(config(tracking_error=0.0, torque_band=0.8))
    rig.torque = 19.0  # of 25 N.m
    rig.run(0.3)
    assert rig.kernel.mode is Mode.HOLD and rig.kernel.counters.reflexes == 0
    rig.torque = 21.0
    rig.run(0.3)
    assert rig.kernel.mode is Mode.FAULT and "N.m" in rig.kernel.reason
    rig.torque = float("nan")
    rig.rearm()
    rig.run(0.01)
    assert rig.kernel.mode is not Mode.INIT


def test_a_short_peak_does_not_trip():
    rig = Held(config(torque_band=0.8))
    rig.torque = 30.0
    rig.run(0.04)
    rig.torque = 0.0
    rig.run(0.1)
    assert rig.kernel.mode is Mode.HOLD and rig.kernel.counters.reflexes == 0


def test_bands_of_zero_watch_nothing():
    reflex = Reflex(("a", "b"), 0.0, np.zeros(2), 0)
    assert reflex.watch(np.full(2, 9.0), np.zeros(2), np.full(2, 1e9), 0) == ""
    assert not reflex.tripped


def test_rearming_forgets_a_reflex():
    rig = Held(config())
    push(rig)
    rig.measured[3] = 0.1
    rig.rearm()
    rig.run(0.2)
    assert rig.kernel.mode is Mode.HOLD
    with pytest.raises(ControlError):
        rig.kernel.set_speed_scale(2.0)


def test_towards_a_limit_a_joint_moves_no_faster_than_its_distance_allows():
    rig = Rig(ControlConfig(start_ramp=0.0, limit_repulsion=0.2), start=np.where(np.arange(15) == 3, 1.0, 0.0))
    upper = rig.kernel.limits.upper[3]
    ramp = np.minimum(np.arange(1, 33) * 0.05 / 0.5, 1.0)[:, None]
    rig.send(rig.measured + (np.where(np.arange(15) == 3, upper, 0.0) - rig.measured) * ramp, age=0.0)
    rig.run(3.0)
    rig.judge()
    speed, distance = np.array(rig.velocities)[:, 3], upper - rig.path[:, 3]
    assert speed.max() > 0.5
    # Half as much again while it slows down for it, within jerk and acceleration limits.
    assert (speed[1:] <= 1.5 * np.maximum(distance[:-1], 0.0) / 0.2 + 1e-3).all()
    assert distance[-1] < 1e-3
