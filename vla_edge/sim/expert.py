"""A scripted hand: where the joints should go from here, for any goal of the scene.

The expert is a velocity field over joint positions: a function of the state and the goal alone, without memory, so
that the same picture and instruction always have the same answer. The fingertip follows a funnel that leads over the
object and down to it; damped least squares (Nakamura and Hanafusa 1986, Wampler 1986) with the home pose in the null
space turn that into joint velocities of one arm and the waist, and the other arm eases home.
"""

from __future__ import annotations

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
        self._chains: dict[tuple[str, str], Chain] = {}

    def plan(self, n_steps: int = 32, goal: Goal | None = None, start: np.ndarray | None = None) -> np.ndarray:
        """Joint targets from now on, without noise.

        Args:
            n_steps: rows.
            goal: the episode's own by default.
            start: (15,) rad, the measured positions by default.

        Returns:
            (n_steps, 15) rad, DRIVEN_JOINTS; row i is for `DT * (i + 1)` s from now.
        """
        start = self._world.joint_state().position if start is None else start
        return self.plan_batch(np.asarray(start)[None], self.target(goal)[None], n_steps, goal)[0]

    def target(self, goal: Goal | None = None) -> np.ndarray:
        """(3,) m: where the fingertip of a goal should come to rest."""
        return self._world.touch_point(goal) + (0.0, 0.0, HOVER_M)

    def plan_batch(
        self, starts: np.ndarray, targets: np.ndarray, n_steps: int = 32, goal: Goal | None = None
    ) -> np.ndarray:
        """Plans from many states at once, for one hand.

        Args:
            starts: (B, 15) rad.
            targets: (B, 3) m, from `target`.

        Returns:
            (B, n_steps, 15) rad.
        """
        goal = goal or self._world.episode.goal
        chain = self._chain(goal.hand)
        plan = np.empty((len(starts), n_steps, 15))
        q = np.array(starts, np.float64)
        for step in range(n_steps):
            velocity = _velocity(chain, q, targets)
            q = np.minimum(np.maximum(q + DT * velocity, chain.lower), chain.upper)
            plan[:, step] = q
            if np.abs(velocity).max() < _STILL:
                plan[:, step + 1 :] = q[:, None]
                break
        return plan

    def _chain(self, hand: str) -> Chain:
        key = (hand, self._world.episode.tier)
        if key not in self._chains:
            self._chains[key] = Chain(self._world.physics, HANDS.index(hand))
        return self._chains[key]


class Chain:
    """Waist and one arm: kinematics of many states, on a state of its own.

    Args:
        physics: of the world.
        hand: 0 left, 1 right.
    """

    def __init__(self, physics, hand: int):
        import mujoco

        self._mujoco = mujoco
        self._model, self._data = physics.model, mujoco.MjData(physics.model)
        self._data.qpos[:] = physics.data.qpos
        self._qpos, self._qpos_index = self._data.qpos, physics.qpos_index
        self.joints = np.array((*range(7 * hand, 7 * hand + 7), 14))
        self.idle = slice(7 * (1 - hand), 7 * (1 - hand) + 7)
        self._columns = physics.dof_index[self.joints]
        self._site = physics.model.site(f"{HANDS[hand]}_fingertip").id
        self._tip, self._frame = self._data.site_xpos[self._site], self._data.site_xmat[self._site]
        self.lower, self.upper = physics.lower + _LIMIT_MARGIN, physics.upper - _LIMIT_MARGIN

    def forward(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B, 15) rad -> (B, 3) m fingertips, (B, 3, 3) hand axes as columns, (B, 6, 8) Jacobian, linear then angular."""
        mujoco, model, data = self._mujoco, self._model, self._data
        tips, frames = np.empty((len(q), 3)), np.empty((len(q), 9))
        jacobians = np.empty((len(q), 6, model.nv))
        for i in range(len(q)):
            self._qpos[self._qpos_index] = q[i]
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacSite(model, data, jacobians[i, :3], jacobians[i, 3:], self._site)
            tips[i], frames[i] = self._tip, self._frame
        return tips, frames.reshape(-1, 3, 3), jacobians[:, :, self._columns]


def _velocity(chain: Chain, q: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The field: (B, 15) rad/s at joints (B, 15) for fingertip targets (B, 3) m."""
    tips, frames, motion = chain.forward(q)
    # Rows 0-2 move the tip; 3 pitches the fingers (the hand's x axis), 4 levels the palm (its z axis).
    jacobian = np.empty((len(q), 5, 8))
    jacobian[:, :3] = motion[:, :3]
    for row, axis in ((3, frames[:, :, 0]), (4, frames[:, :, 2])):
        jacobian[:, row] = _TILT_WEIGHT * (motion[:, 3] * axis[:, 1:2] - motion[:, 4] * axis[:, :1])
    wanted = np.empty((len(q), 5, 1))
    wanted[:, :3, 0] = _tip_velocity(tips, targets)
    wanted[:, 3, 0] = _TILT_WEIGHT * _TILT_GAIN * (_FINGER_PITCH - frames[:, 2, 0])
    wanted[:, 4, 0] = -_TILT_WEIGHT * _TILT_GAIN * frames[:, 2, 2]
    posture = (_POSTURE_GAIN * (HOME[chain.joints] - q[:, chain.joints]))[:, :, None]
    weighted = jacobian * _MOBILITY
    gram = weighted @ jacobian.transpose(0, 2, 1) + _DAMPING_MATRIX
    moves = posture + weighted.transpose(0, 2, 1) @ np.linalg.solve(gram, wanted - jacobian @ posture)
    moves = moves[:, :, 0]
    moves *= np.minimum(1.0, PEAK_SPEED / np.maximum(np.abs(moves).max(1, keepdims=True), 1e-9))
    velocity = np.zeros(q.shape)
    velocity[:, chain.joints] = moves
    idle = _IDLE_GAIN * (HOME[chain.idle] - q[:, chain.idle])
    velocity[:, chain.idle] = np.minimum(np.maximum(idle, -IDLE_SPEED), IDLE_SPEED)
    return velocity


def _tip_velocity(tips: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(B, 3) m/s: over the object first, then down; sideways only as far as the height allows."""
    way = targets - tips
    away = np.sqrt(way[:, 0] ** 2 + way[:, 1] ** 2)
    ramp = np.clip((away - _FUNNEL_INNER_M) / (_FUNNEL_OUTER_M - _FUNNEL_INNER_M), 0.0, 1.0)
    way[:, 2] += _CLEARANCE_M * ramp * ramp * (3 - 2 * ramp)
    way[:, :2] *= np.clip(1.0 - (way[:, 2:] - 0.01) / 0.05, 0.05, 1.0)
    way *= _TIP_GAIN
    return way * np.minimum(1.0, _TIP_SPEED / np.maximum(np.sqrt((way * way).sum(1, keepdims=True)), 1e-9))
