"""A scripted hand: where the joints should go from here, for any goal of the scene.

The expert is a velocity field over joint positions: a function of the state and the goal alone, without memory, so
that the same picture and instruction always have the same answer. The fingertip follows a funnel that leads over the
object and down to it; damped least squares (Nakamura and Hanafusa 1986, Wampler 1986) with the home pose in the null
space turn that into joint velocities of one arm and the waist, and the other arm eases home.
"""

from __future__ import annotations

import math

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.tasks import HANDS, Goal
from vla_edge.sim.world import HOME, TabletopWorld

DT = 0.05
"""s between rows of a plan."""
PEAK_SPEED = 2.0
"""rad/s, of any joint."""
IDLE_SPEED = 1.2
"""rad/s, of the arm that has nothing to do."""
HOVER_M = 0.01
"""Fingertip above the touch point at the end."""

_TIP_SPEED, _TIP_GAIN = 0.65, 6.0
_CLEARANCE_M, _FUNNEL_INNER_M, _FUNNEL_OUTER_M = 0.085, 0.02, 0.11
_FINGER_PITCH = -0.65
_POSTURE_GAIN, _IDLE_GAIN = 1.5, 3.0
_DAMPING_MATRIX = 0.06**2 * np.eye(5)
_TILT_WEIGHT, _TILT_GAIN = 0.15, 3.0
_STILL = 0.005
_MOBILITY = np.array((1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25))
"""How willingly each joint of the chain moves; the waist less, since it carries the camera and the other arm."""
_LIMIT_MARGIN = 0.03


class Expert:
    """Plans for whatever a world's episode asks.

    Args:
        world: watched, never changed.
    """

    def __init__(self, world: TabletopWorld):
        self._world = world
        self._chains: dict[int, _Chain] = {}

    def plan(self, n_steps: int = 32, goal: Goal | None = None, start: np.ndarray | None = None) -> np.ndarray:
        """Joint targets from now on, without noise.

        Args:
            n_steps: rows.
            goal: the episode's own by default.
            start: (15,) rad, the measured positions by default.

        Returns:
            (n_steps, 15) rad, DRIVEN_JOINTS; row i is for `DT * (i + 1)` s from now.
        """
        world = self._world
        goal = goal or world.episode.goal
        start = world.joint_state().position if start is None else start
        chain = self._chain(goal.hand)
        x, y, z = world.touch_point(goal).tolist()
        return _roll_out(chain, np.array(start, np.float64), [x, y, z + HOVER_M], n_steps)

    def _chain(self, hand: str) -> _Chain:
        key = (hand, id(self._world._physics))
        if key not in self._chains:
            self._chains[key] = _Chain(self._world._physics, HANDS.index(hand))
        return self._chains[key]


class _Chain:
    """Waist and one arm: kinematics and the field, on a state of its own."""

    def __init__(self, physics, hand: int):
        import mujoco

        self._mujoco = mujoco
        self._model, self._data = physics.model, mujoco.MjData(physics.model)
        self._data.qpos[:] = physics.data.qpos
        self._qpos, self._qpos_index = self._data.qpos, physics.qpos_index
        self._columns = physics.dof_index[[*range(7 * hand, 7 * hand + 7), 14]]
        self._site = physics.model.site(f"{HANDS[hand]}_fingertip").id
        self._tip, self._frame = self._data.site_xpos[self._site], self._data.site_xmat[self._site]
        self._linear, self._angular = np.zeros((2, 3, physics.model.nv))
        self._jacobian = np.zeros((5, 8))
        self._tilt = np.zeros((2, 2))
        self._mobility = np.ones(15)
        self._chain = np.array((*range(7 * hand, 7 * hand + 7), 14))
        self._idle = slice(7 * (1 - hand), 7 * (1 - hand) + 7)
        self.lower, self.upper = physics.lower + _LIMIT_MARGIN, physics.upper - _LIMIT_MARGIN

    def tip(self, q: np.ndarray) -> np.ndarray:
        """(3,) m: the fingertip at joints (15,)."""
        self._qpos[self._qpos_index] = q
        self._mujoco.mj_kinematics(self._model, self._data)
        return self._tip.copy()

    def velocity(self, q: np.ndarray, target: np.ndarray) -> np.ndarray:
        """(15,) rad/s: the field at joints (15,) for a fingertip target (3,) m."""
        self._qpos[self._qpos_index] = q
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)
        self._mujoco.mj_jacSite(self._model, self._data, self._linear, self._angular, self._site)
        xx, _, xz, yx, _, yz, zx, _, zz = self._frame.tolist()
        # Rows 0-2 move the tip; 3 pitches the fingers (the hand's x axis), 4 levels the palm (its z axis).
        jacobian, tilt = self._jacobian, self._tilt
        jacobian[:3] = self._linear[:, self._columns]
        tilt[0, 0], tilt[0, 1], tilt[1, 0], tilt[1, 1] = yx, -xx, yz, -xz
        np.matmul(_TILT_WEIGHT * tilt, self._angular[:2, self._columns], out=jacobian[3:])
        tip_x, tip_y, tip_z = _tip_velocity(self._tip.tolist(), target)
        turn = _TILT_WEIGHT * _TILT_GAIN
        wanted = np.array((tip_x, tip_y, tip_z, turn * (_FINGER_PITCH - zx), -turn * zz))
        posture = _POSTURE_GAIN * (HOME[self._chain] - q[self._chain])
        weighted = jacobian * _MOBILITY
        moves = posture + weighted.T @ np.linalg.solve(weighted @ jacobian.T + _DAMPING_MATRIX, wanted - jacobian @ posture)
        peak = max(moves.max(), -moves.min())
        if peak > PEAK_SPEED:
            moves *= PEAK_SPEED / peak
        velocity = np.zeros(15)
        velocity[self._chain] = moves
        velocity[self._idle] = np.minimum(
            np.maximum(_IDLE_GAIN * (HOME[self._idle] - q[self._idle]), -IDLE_SPEED), IDLE_SPEED
        )
        return velocity


def _roll_out(chain: _Chain, q: np.ndarray, target: list[float], steps: int) -> np.ndarray:
    plan = np.empty((steps, len(q)))
    for step in range(steps):
        velocity = chain.velocity(q, target)
        q = np.minimum(np.maximum(q + DT * velocity, chain.lower), chain.upper)
        plan[step] = q
        if max(velocity.max(), -velocity.min()) < _STILL:
            plan[step + 1 :] = q
            break
    return plan


def _tip_velocity(tip: list[float], target: list[float]) -> tuple[float, float, float]:
    """m/s: over the object first, then down; sideways only as far as the height allows."""
    dx, dy = target[0] - tip[0], target[1] - tip[1]
    away = math.hypot(dx, dy)
    ramp = min(max((away - _FUNNEL_INNER_M) / (_FUNNEL_OUTER_M - _FUNNEL_INNER_M), 0.0), 1.0)
    dz = target[2] + _CLEARANCE_M * ramp * ramp * (3 - 2 * ramp) - tip[2]
    sideways = min(max(1.0 - (dz - 0.01) / 0.05, 0.05), 1.0)
    x, y, z = _TIP_GAIN * dx * sideways, _TIP_GAIN * dy * sideways, _TIP_GAIN * dz
    slow = min(1.0, _TIP_SPEED / max(math.sqrt(x * x + y * y + z * z), 1e-9))
    return slow * x, slow * y, slow * z
