"""The simulated robot at its table, stepped on a clock of its own.

Nothing here waits or reads a wall clock: a live node paces it, a closed-loop evaluation steps it as fast as it goes,
and both see the same physics.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.episode import Episode, draw_episode
from vla_edge.sim.judge import Judge
from vla_edge.sim.physics import Physics, SimulationError, Snapshot
from vla_edge.sim.scene import TIMESTEP, gains
from vla_edge.sim.tasks import Goal, Outcome
from vla_edge.types import NANOSECONDS, JointCommand, JointState

STEP_NS = round(TIMESTEP * NANOSECONDS)
JUDGE_EVERY = 5
"""Physics steps between looks of the judge: 10 ms, in which a hand moves at most about a centimetre."""

_ARM_HOME = (0.75, 0.12, -0.2, -0.55, 1.2, 0.0, 0.0)
HOME = np.array((*_ARM_HOME, *np.multiply(_ARM_HOME, (1, -1, -1, 1, -1, 1, -1)), 0.0))
"""(15,) rad, DRIVEN_JOINTS: elbows back, palms down over the near edge of the table."""
HOME.setflags(write=False)


class TabletopWorld:
    """A Unitree G1 with fixed pelvis before a table with coloured objects; 15 driven joints, gravity compensated.

    Args:
        start_ns: world time at the first reset; it only ever grows.
    """

    joint_names = DRIVEN_JOINTS
    home = HOME

    def __init__(self, start_ns: int = 0):
        self._time_ns = int(start_ns)
        self._worlds: dict[str, Physics] = {}
        self._physics: Physics | None = None
        self.episode: Episode | None = None
        self._judge: Judge | None = None
        self._reset_ns = self._time_ns
        self._kp, self._kd = gains()

    def reset(self, seed: int, tier: str = "touch", start_sigma: float = 0.02) -> Episode:
        """Sets a scene up and the robot at home, at rest.

        Args:
            seed: of everything that is drawn.
            start_sigma: rad, spread of the starting pose.

        Raises:
            TaskError: no such tier.
            AssetError: the robot's model is not installed.
        """
        episode = draw_episode(seed, tier, start_sigma)
        physics = self._use(tier)
        physics.dress(episode.objects)
        start = np.clip(HOME + episode.start_offset, physics.lower, physics.upper)
        physics.place(start, episode.objects)
        self.episode, self._judge, self._reset_ns = episode, Judge(episode), self._time_ns
        return episode

    def ask(self, goal: Goal, instruction: str | None = None) -> Episode:
        """Asks for something else of the same scene; what was touched already stays touched."""
        episode, _ = self._asked()
        episode.object_index(goal)
        self.episode = replace(episode, goal=goal, instruction=instruction or goal.wordings[0])
        return self.episode

    def apply(self, command: JointCommand) -> None:
        """Drives the named joints: torque = kp (position - q) + kd (velocity - dq) + effort. Others keep their target.

        Raises:
            SimulationError: a joint that is not driven, or a value that is not finite.
        """
        physics = self.physics
        index = physics.indices(command.names)
        position = np.asarray(command.position, np.float64)
        ctrl = np.clip(position, physics.lower[index], physics.upper[index])
        # The servo computes kp (ctrl - q) - kd dq: feed-forward terms enter through ctrl.
        ctrl = ctrl + (self._kd[index] * command.velocity + command.effort) / self._kp[index]
        if not np.isfinite(ctrl).all():
            raise SimulationError("a joint command holds a value that is not finite; the world keeps its last targets")
        physics.data.ctrl[index] = ctrl

    def disturb(self, joint: str, torque: float) -> None:
        """Lets a torque act on a driven joint until told otherwise, N.m; no other joint is disturbed.

        Raises:
            SimulationError: a joint that is not driven.
        """
        physics = self.physics
        (index,) = physics.indices((joint,))
        physics.data.qfrc_applied[:] = 0.0
        physics.data.qfrc_applied[physics.dof_index[index]] = torque

    def step(self, seconds: float) -> None:
        """Moves time on, by whole physics steps.

        Raises:
            SimulationError: not a multiple of the time step.
        """
        steps = round(seconds * NANOSECONDS / STEP_NS)
        if steps < 0 or abs(steps * STEP_NS - seconds * NANOSECONDS) > 1000:
            raise SimulationError(f"the world steps in multiples of {TIMESTEP} s, not {seconds} s")
        physics = self.physics
        while steps > 0:
            done = (self._time_ns - self._reset_ns) // STEP_NS
            now = min(steps, JUDGE_EVERY - done % JUDGE_EVERY)
            physics.advance(now)
            self._time_ns += now * STEP_NS
            steps -= now
            if self._judge is not None and (done + now) % JUDGE_EVERY == 0:
                self._judge.watch(self.elapsed_s, *physics.touches())

    @property
    def physics(self) -> Physics:
        """The model and state of the present tier: for experts to read, not to write.

        Raises:
            SimulationError: nothing was set up yet.
        """
        if self._physics is None:
            raise SimulationError("the world has no scene yet; call reset first")
        return self._physics

    @property
    def time_ns(self) -> int:
        return self._time_ns

    @property
    def elapsed_s(self) -> float:
        """World time since the reset, s."""
        return (self._time_ns - self._reset_ns) / NANOSECONDS

    def joint_state(self) -> JointState:
        """The 15 driven joints, measured without noise."""
        physics = self.physics
        data = physics.data
        return JointState(
            self._time_ns,
            DRIVEN_JOINTS,
            data.qpos[physics.qpos_index],
            data.qvel[physics.dof_index],
            data.actuator_force[: len(DRIVEN_JOINTS)],
        )

    def render(self, height: int = 480, width: int = 640, camera: str = "head") -> np.ndarray:
        """(height, width, 3) uint8 RGB of now.

        Raises:
            RenderError: nothing can be drawn here, or not this.
        """
        return self.physics.render(height, width, camera)

    def outcome(self, goal: Goal | None = None) -> Outcome:
        """How the episode's goal, or another goal of its scene, stands."""
        episode, judge = self._asked()
        return judge.outcome(goal or episode.goal)

    def finished(self, goal: Goal | None = None) -> bool:
        """Whether the goal is decided: reached, spoilt by a wrong touch, or out of time."""
        episode, _ = self._asked()
        outcome = self.outcome(goal)
        return outcome.success or outcome.wrong_first or self.elapsed_s >= episode.time_limit_s

    def fingertips(self) -> np.ndarray:
        """(2, 3) m, world: left and right fingertip."""
        return self.physics.current_tips()

    def object_centre(self, goal: Goal | None = None) -> np.ndarray:
        """(3,) m, world: the centre of the object a goal names."""
        episode, _ = self._asked()
        return self.physics.centres()[episode.object_index(goal or episode.goal)].copy()

    def touch_point(self, goal: Goal | None = None) -> np.ndarray:
        """(3,) m, world: the middle of the top of the object a goal names."""
        episode, _ = self._asked()
        index = episode.object_index(goal or episode.goal)
        return self.physics.centres()[index] + (0.0, 0.0, episode.objects[index].half_height)

    def project(self, point: np.ndarray, height: int, width: int, camera: str = "head") -> np.ndarray:
        """(2,) x and y in pixels of a point (3,) m in a picture of that size; pixel i covers i to i + 1."""
        return self.physics.project(np.asarray(point, np.float64), height, width, camera)

    def snapshot(self) -> Snapshot:
        """The state of now, to be drawn or continued by another world."""
        data = self.physics.data
        arrays = (data.qpos, data.qvel, data.ctrl, data.mocap_pos, data.mocap_quat)
        return Snapshot(self.physics.tier, self.physics.objects, self._time_ns, *(array.copy() for array in arrays))

    def restore(self, snapshot: Snapshot) -> None:
        """Takes over a state, for drawing and stepping; an episode that is not of the same scene is forgotten."""
        physics = self._use(snapshot.tier)
        if physics.objects != snapshot.objects:
            physics.dress(snapshot.objects)
        physics.restore(snapshot)
        if self.episode is None or self.episode.objects != snapshot.objects:
            self.episode, self._judge = None, None
        self._time_ns = snapshot.time_ns

    def close(self) -> None:
        """Frees the drawing contexts."""
        for physics in self._worlds.values():
            physics.close()

    def _use(self, tier: str) -> Physics:
        if tier not in self._worlds:
            self._worlds[tier] = Physics(tier)
        self._physics = self._worlds[tier]
        return self._physics

    def _asked(self) -> tuple[Episode, Judge]:
        if self.episode is None or self._judge is None:
            raise SimulationError("the world has no episode; call reset first")
        return self.episode, self._judge
