"""A finger closes until it meets something, holds it, and opens when told."""

import numpy as np
import pytest

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlKernel
from vla_edge.control.modes import Mode
from vla_edge.robots.dex3 import HAND_JOINTS
from vla_edge.robots.robot import load_robot
from vla_edge.types import ActionChunk, JointState

NAMES = HAND_JOINTS["left"]


class Hand:
    """Fingers that meet something at a fraction of their way, and press with what stiffness makes of the distance."""

    def __init__(self, meets_at=None, stiffness=3.0):
        self.robot = load_robot("g1+dex3").select(NAMES)
        config = ControlConfig(start_ramp=0.0, tracking_error=0.0, torque_band=0.0, position_margin=0.0)
        self.kernel = ControlKernel(self.robot, NAMES, config)
        self.sign = np.sign(self.robot.column("grasp_torque"))
        self.closed = np.where(self.sign > 0, self.robot.column("upper"), self.robot.column("lower")) * np.abs(self.sign)
        self.meets_at, self.stiffness, self.now = meets_at, stiffness, 10**9
        self.path = []
        self.feel(np.zeros(7))
        self.kernel.rearm(JointState(self.now, NAMES, np.zeros(7)), self.now)

    def feel(self, command):
        measured, torque = command.copy(), np.zeros(7)
        if self.meets_at is not None:
            wall = self.meets_at * self.closed
            inside = self.sign * (command - wall) > 0
            measured = np.where(inside, wall, command)
            torque = np.where(inside, self.stiffness * (command - wall), 0.0)
        self.state = JointState(self.now, NAMES, measured, effort=torque)

    def go(self, target, seconds):
        start = self.kernel.position.copy()
        chunk = start + (target - start) * np.minimum(np.arange(1, 65) / 20, 1.0)[:, None]
        self.kernel.accept_chunk(ActionChunk(self.now, NAMES, chunk, 0.05), self.now)
        for _ in range(round(seconds * 1000)):
            self.now += 1_000_000
            self.feel(self.kernel.position)
            self.kernel.update_joints(self.state, self.now)
            self.kernel.tick(self.now)
            self.path.append(self.kernel.position.copy())


def test_fingers_that_meet_nothing_close_all_the_way():
    hand = Hand()
    hand.go(hand.closed, 2.0)
    np.testing.assert_allclose(hand.kernel.position, hand.closed, atol=1e-3)
    assert hand.kernel.holding == 0


def test_fingers_stop_where_their_torque_reaches_the_band_and_hold_on():
    hand = Hand(meets_at=0.5)
    hand.go(hand.closed, 2.0)
    fingers = np.flatnonzero(hand.sign)
    assert hand.kernel.holding == len(fingers) == 6
    # They press with 0.5 N.m at 3 N.m/rad: 0.17 rad into it, and no further, however long "close" is said.
    depth = (hand.sign * (hand.kernel.position - 0.5 * hand.closed))[fingers]
    np.testing.assert_allclose(depth, 0.5 / 3.0, atol=0.03)
    pressed = np.abs(hand.state.effort[fingers])
    assert (pressed >= 0.45).all() and (pressed <= 0.6).all()
    assert hand.kernel.mode is Mode.FOLLOW


def test_fingers_open_when_told_and_close_anew():
    hand = Hand(meets_at=0.5)
    hand.go(hand.closed, 2.0)
    hand.go(np.zeros(7), 2.0)
    np.testing.assert_allclose(hand.kernel.position, 0.0, atol=1e-3)
    assert hand.kernel.holding == 0
    hand.meets_at = 0.8
    hand.go(hand.closed, 2.5)
    depth = (hand.sign * (hand.kernel.position - 0.8 * hand.closed))[np.flatnonzero(hand.sign)]
    assert (depth > 0.1).all() and (depth < 0.22).all()


def test_what_the_hand_does_stays_within_the_limits():
    hand = Hand(meets_at=0.4, stiffness=1000.0)
    for target in (hand.closed, np.zeros(7), hand.closed):
        hand.go(target, 1.2)
    path = np.array([np.zeros(7)] * 3 + hand.path)
    limits = hand.kernel.limits
    assert (path >= limits.lower).all() and (path <= limits.upper).all()
    for order, limit in ((1, limits.velocity), (2, limits.acceleration), (3, limits.jerk)):
        assert (np.abs(np.diff(path, order, axis=0)) * 1000.0**order <= limit).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_joint_that_turns_the_thumb_is_no_finger(side):
    robot = load_robot("g1+dex3").select(HAND_JOINTS[side])
    assert robot.column("grasp_torque")[0] == 0.0
