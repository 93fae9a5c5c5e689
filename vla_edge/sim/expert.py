"""A scripted hand: where the joints should go from here, for any goal of the scene.

The expert is a velocity field over joint positions: a function of the state and the goal alone, without memory, so
that the same picture and instruction always have the same answer. `fingertip.py` says where the tip wants
to go; damped least squares (Nakamura and Hanafusa 1986, Wampler 1986) with the home pose in the null space turn
that into joint velocities of one arm and the waist, and the other arm eases home.
"""

from __future__ import annotations

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.fingertip import Situation, tip_velocity
from vla_edge.sim.judge import PUSH_M, SIDES
from vla_edge.sim.tasks import HANDS, Goal
from vla_edge.sim.world import HOME, TabletopWorld

DT = 0.05
"""s between rows of a plan."""
PEAK_SPEED = 2.0
"""rad/s, of any joint."""
IDLE_SPEED = 1.2
"""rad/s, of the arm that has nothing to do."""

# How the hand is turned: (axis of the hand, component in the world, wanted value). Axis 0 runs along the fingers, 2
# across them. To touch, fingers down and palm down; to push, fingers down and ahead, palm upright like a fin.
_TOUCH_TILTS = ((0, 2, -0.65), (2, 2, 0.0))
_PUSH_TILTS = ((0, 2, -0.75), (2, 1, 0.0), (0, 1, 0.0))
_POSTURE_GAIN, _IDLE_GAIN = 1.5, 3.0
_TOUCH_DAMPING, _PUSH_DAMPING = 0.06, 0.03
_TILT_WEIGHT, _TILT_GAIN = 0.15, 3.0
_STILL = 0.005
_MOBILITY = np.array((1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25))
"""How willingly each joint of the chain moves; the waist less, since it carries the camera and the other arm."""
_LIMIT_MARGIN = 0.03
_PUSH_BEYOND_M = 0.03


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
        return self.plan_batch(np.asarray(start)[None], [self.situation(goal)], n_steps, goal)[0]

    def situation(self, goal: Goal | None = None) -> Situation:
        """What the answer depends on besides the joints, now, for a goal (the episode's own by default)."""
        episode = self._world.episode
        goal = goal or episode.goal
        item = episode.objects[episode.object_index(goal)]
        side = SIDES[goal.place] if goal.place else 0.0
        return Situation(
            self._world.object_centre(goal)[None],
            np.array([item.half_height]),
            side,
            np.array([item.position[1] + side * (PUSH_M + _PUSH_BEYOND_M)]),
        )

    def fingertip(self, joints: np.ndarray, goal: Goal | None = None) -> np.ndarray:
        """(3,) m: where the fingertip of a goal's hand is with joints (15,)."""
        return self._chain((goal or self._world.episode.goal).hand).forward(np.asarray(joints)[None])[0][0]

    def plan_batch(
        self, starts: np.ndarray, situations: list[Situation], n_steps: int = 32, goal: Goal | None = None
    ) -> np.ndarray:
        """Plans for one goal from many states at once; ten times faster than one by one.

        Args:
            starts: (B, 15) rad.
            situations: B, from `situation`.

        Returns:
            (B, n_steps, 15) rad.
        """
        chain = self._chain((goal or self._world.episode.goal).hand)
        situation = Situation(
            np.concatenate([each.centre for each in situations]),
            np.concatenate([each.half_height for each in situations]),
            situations[0].side,
            np.concatenate([each.wanted_y for each in situations]),
        )
        plan = np.empty((len(starts), n_steps, 15))
        q = np.array(starts, np.float64)
        for step in range(n_steps):
            velocity, situation = _velocity(chain, q, situation)
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
        """Joints (B, 15) -> (B, 3) m fingertips, (B, 3, 3) hand axes as columns, (B, 6, 8) Jacobian, linear first."""
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


def _velocity(chain: Chain, q: np.ndarray, situation: Situation) -> tuple[np.ndarray, Situation]:
    """The field: (B, 15) rad/s at joints (B, 15), and the situation as it is with the fingertips there."""
    tips, frames, motion = chain.forward(q)
    situation = situation.after(tips)
    # Rows 0-2 move the tip; the others turn the hand: one component of one of its axes each.
    tilts, damping = (_PUSH_TILTS, _PUSH_DAMPING) if situation.side else (_TOUCH_TILTS, _TOUCH_DAMPING)
    jacobian = np.empty((len(q), 3 + len(tilts), 8))
    wanted = np.empty((len(q), 3 + len(tilts), 1))
    jacobian[:, :3] = motion[:, :3]
    wanted[:, :3, 0] = tip_velocity(tips, situation)
    for row, (axis, component, value) in enumerate(tilts, 3):
        before, after = (component + 1) % 3, (component + 2) % 3
        direction = frames[:, :, axis]
        jacobian[:, row] = _TILT_WEIGHT * (
            motion[:, 3 + before] * direction[:, after, None] - motion[:, 3 + after] * direction[:, before, None]
        )
        wanted[:, row, 0] = _TILT_WEIGHT * _TILT_GAIN * (value - direction[:, component])
    posture = (_POSTURE_GAIN * (HOME[chain.joints] - q[:, chain.joints]))[:, :, None]
    weighted = jacobian * _MOBILITY
    gram = weighted @ jacobian.transpose(0, 2, 1) + damping**2 * np.eye(3 + len(tilts))
    moves = posture + weighted.transpose(0, 2, 1) @ np.linalg.solve(gram, wanted - jacobian @ posture)
    moves = moves[:, :, 0]
    moves *= np.minimum(1.0, PEAK_SPEED / np.maximum(np.abs(moves).max(1, keepdims=True), 1e-9))
    velocity = np.zeros(q.shape)
    velocity[:, chain.joints] = moves
    idle = _IDLE_GAIN * (HOME[chain.idle] - q[:, chain.idle])
    velocity[:, chain.idle] = np.minimum(np.maximum(idle, -IDLE_SPEED), IDLE_SPEED)
    return velocity, situation
