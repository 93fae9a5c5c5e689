"""The simulated robot at its table, stepped on a clock of its own.

Nothing here waits or reads a wall clock: a live node paces it, a closed-loop evaluation steps it as fast as it goes,
and both see the same physics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.episode import Episode, TabletopObject, draw_episode
from vla_edge.sim.judge import Judge
from vla_edge.sim.scene import HAND_GEOMS, RGBA, TIMESTEP, build_model, gains
from vla_edge.sim.tasks import HANDS, Goal, Outcome
from vla_edge.types import NANOSECONDS, JointCommand, JointState, VlaEdgeError

STEP_NS = round(TIMESTEP * NANOSECONDS)
JUDGE_EVERY = 5
"""Physics steps between looks of the judge: 10 ms, in which a hand moves at most about a centimetre."""

_ARM_HOME = (0.75, 0.12, -0.2, -0.55, 1.2, 0.0, 0.0)
HOME = np.array((*_ARM_HOME, *np.multiply(_ARM_HOME, (1, -1, -1, 1, -1, 1, -1)), 0.0))
"""(15,) rad, DRIVEN_JOINTS: elbows back, palms down over the near edge of the table."""
HOME.setflags(write=False)


class SimulationError(VlaEdgeError):
    """The world was asked for something it cannot do."""


@dataclass(frozen=True)
class Snapshot:
    """Everything needed to draw a state elsewhere, or to go on from it; it can be sent between processes.

    Attributes:
        tier, objects: which model, and how its objects are dressed.
        time_ns: world time.
        qpos, qvel, ctrl: of the physics.
        mocap_pos, mocap_quat: poses of objects that do not move.
    """

    tier: str
    objects: tuple[TabletopObject, ...]
    time_ns: int
    qpos: np.ndarray
    qvel: np.ndarray
    ctrl: np.ndarray
    mocap_pos: np.ndarray
    mocap_quat: np.ndarray


class TabletopWorld:
    """A Unitree G1 with fixed pelvis before a table with coloured objects; 15 driven joints, gravity compensated.

    Args:
        start_ns: world time at the first reset; it only ever grows.
    """

    joint_names = DRIVEN_JOINTS
    home = HOME

    def __init__(self, start_ns: int = 0):
        self._time_ns = int(start_ns)
        self._worlds: dict[str, _Physics] = {}
        self._physics: _Physics | None = None
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
        self._ready().episode.object_index(goal)
        self.episode = replace(self.episode, goal=goal, instruction=instruction or goal.wordings[0])
        return self.episode

    def apply(self, command: JointCommand) -> None:
        """Drives the named joints: torque = kp (position - q) + kd (velocity - dq) + effort. Others keep their target.

        Raises:
            SimulationError: a joint that is not driven, or a value that is not finite.
        """
        physics = self._ready()._physics
        index = physics.indices(command.names)
        position = np.asarray(command.position, np.float64)
        ctrl = np.clip(position, physics.lower[index], physics.upper[index])
        # The servo computes kp (ctrl - q) - kd dq: feed-forward terms enter through ctrl.
        ctrl = ctrl + (self._kd[index] * command.velocity + command.effort) / self._kp[index]
        if not np.isfinite(ctrl).all():
            raise SimulationError("a joint command holds a value that is not finite; the world keeps its last targets")
        physics.data.ctrl[index] = ctrl

    def step(self, seconds: float) -> None:
        """Moves time on, by whole physics steps.

        Raises:
            SimulationError: not a multiple of the time step.
        """
        steps = round(seconds * NANOSECONDS / STEP_NS)
        if steps < 0 or abs(steps * STEP_NS - seconds * NANOSECONDS) > 1000:
            raise SimulationError(f"the world steps in multiples of {TIMESTEP} s, not {seconds} s")
        physics = self._ready()._physics
        while steps > 0:
            done = (self._time_ns - self._reset_ns) // STEP_NS
            now = min(steps, JUDGE_EVERY - done % JUDGE_EVERY)
            physics.advance(now)
            self._time_ns += now * STEP_NS
            steps -= now
            if (done + now) % JUDGE_EVERY == 0:
                self._judge.watch(self.elapsed_s, *physics.touches())

    @property
    def physics(self) -> _Physics:
        """The model and state of the present tier, for experts: to be read, not written."""
        return self._ready()._physics

    @property
    def time_ns(self) -> int:
        return self._time_ns

    @property
    def elapsed_s(self) -> float:
        """World time since the reset, s."""
        return (self._time_ns - self._reset_ns) / NANOSECONDS

    def joint_state(self) -> JointState:
        """The 15 driven joints, measured without noise."""
        physics = self._ready()._physics
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
        return self._ready()._physics.render(height, width, camera)

    def outcome(self, goal: Goal | None = None) -> Outcome:
        """How the episode's goal, or another goal of its scene, stands."""
        return self._ready()._judge.outcome(goal)

    def finished(self, goal: Goal | None = None) -> bool:
        """Whether the goal is decided: reached, spoilt by a wrong touch, or out of time."""
        outcome = self.outcome(goal)
        return outcome.success or outcome.wrong_first or self.elapsed_s >= self.episode.time_limit_s

    def fingertips(self) -> np.ndarray:
        """(2, 3) m, world: left and right fingertip."""
        return self._ready()._physics.current_tips()

    def object_centre(self, goal: Goal | None = None) -> np.ndarray:
        """(3,) m, world: the centre of the object a goal names."""
        return self._ready()._physics.centres()[self.episode.object_index(goal or self.episode.goal)].copy()

    def touch_point(self, goal: Goal | None = None) -> np.ndarray:
        """(3,) m, world: the middle of the top of the object a goal names."""
        episode = self._ready().episode
        index = episode.object_index(goal or episode.goal)
        point = self._physics.centres()[index].copy()
        point[2] += episode.objects[index].half_height
        return point

    def project(self, point: np.ndarray, height: int, width: int, camera: str = "head") -> np.ndarray:
        """(2,) x and y in pixels of a point (3,) m in a picture of that size; pixel i covers i to i + 1."""
        return self._ready()._physics.project(np.asarray(point, np.float64), height, width, camera)

    def snapshot(self) -> Snapshot:
        """The state of now, to be drawn or continued by another world."""
        data = self._ready()._physics.data
        arrays = (data.qpos, data.qvel, data.ctrl, data.mocap_pos, data.mocap_quat)
        return Snapshot(self.episode.tier, self.episode.objects, self._time_ns, *(array.copy() for array in arrays))

    def restore(self, snapshot: Snapshot) -> None:
        """Takes over a state for drawing and stepping. The judge stays with the world that owns the episode."""
        physics = self._use(snapshot.tier)
        physics.dress(snapshot.objects)
        physics.restore(snapshot)
        if self.episode is None or self.episode.objects != snapshot.objects:
            goal = Goal(snapshot.objects[0].colour, snapshot.objects[0].shape, HANDS[0])
            self.episode = replace(
                draw_episode(0, snapshot.tier), objects=snapshot.objects, goal=goal, goals=(goal,), instruction=""
            )
            self._judge = Judge(self.episode)
        self._time_ns = snapshot.time_ns

    def close(self) -> None:
        """Frees the drawing contexts."""
        for physics in self._worlds.values():
            physics.close()

    def _use(self, tier: str) -> _Physics:
        if tier not in self._worlds:
            self._worlds[tier] = _Physics(tier)
        self._physics = self._worlds[tier]
        return self._physics

    def _ready(self) -> TabletopWorld:
        if self._physics is None or self._judge is None:
            raise SimulationError("the world has no scene yet; call reset first")
        return self


class _Physics:
    """One compiled model with its state, and where things lie in MuJoCo's arrays."""

    def __init__(self, tier: str):
        import mujoco

        self._mujoco = mujoco
        self.model = build_model(tier)
        self.data = mujoco.MjData(self.model)
        model = self.model
        self.qpos_index = np.array([model.joint(name).qposadr[0] for name in DRIVEN_JOINTS])
        self.dof_index = np.array([model.joint(name).dofadr[0] for name in DRIVEN_JOINTS])
        self.lower, self.upper = np.array([model.joint(name).range for name in DRIVEN_JOINTS]).T
        self._position = {name: i for i, name in enumerate(DRIVEN_JOINTS)}
        self._names: tuple[tuple[str, ...], np.ndarray] | None = None
        self._tips = [model.site(f"{hand}_fingertip").id for hand in HANDS]
        self._bodies = [i for i in range(model.nbody) if model.body(i).name.startswith("object")]
        self._cubes = [model.geom(f"object{i}_cube").id for i in range(len(self._bodies))]
        self._balls = [model.geom(f"object{i}_ball").id for i in range(len(self._bodies))]
        self._hand_of = np.full(model.ngeom, -1)
        self._object_of = np.full(model.ngeom, -1)
        for hand, side in enumerate(HANDS):
            for part in HAND_GEOMS:
                self._hand_of[model.geom(f"{side}_{part}").id] = hand
        for index, pair in enumerate(zip(self._cubes, self._balls)):
            self._object_of[list(pair)] = index
        self._renderer = None
        self._rates = (model.geom_contype.copy(), model.geom_conaffinity.copy())

    def indices(self, names: tuple[str, ...]) -> np.ndarray:
        """Positions of named joints among the driven ones."""
        if self._names is None or self._names[0] != tuple(names):
            unknown = [name for name in names if name not in self._position]
            if unknown:
                raise SimulationError(f"{unknown[0]!r} is not driven here; the 15 driven joints are {DRIVEN_JOINTS}")
            self._names = (tuple(names), np.array([self._position[name] for name in names], dtype=int))
        return self._names[1]

    def dress(self, objects: tuple[TabletopObject, ...]) -> None:
        """Shows each object's shape in its colour and hides the other."""
        model = self.model
        for index, item in enumerate(objects):
            shown, hidden = self._cubes[index], self._balls[index]
            if item.shape == "ball":
                shown, hidden = hidden, shown
            for geom, on in ((shown, True), (hidden, False)):
                model.geom_contype[geom] = self._rates[0][geom] if on else 0
                model.geom_conaffinity[geom] = self._rates[1][geom] if on else 0
                model.geom_group[geom] = 0 if on else 4
            model.mat_rgba[model.geom_matid[shown]] = RGBA[item.colour]

    def place(self, joints: np.ndarray, objects: tuple[TabletopObject, ...]) -> None:
        """Puts the robot and the objects where an episode begins, at rest."""
        mujoco, model, data = self._mujoco, self.model, self.data
        mujoco.mj_resetData(model, data)
        data.qpos[self.qpos_index] = joints
        data.ctrl[:] = joints
        for index, (body, item) in enumerate(zip(self._bodies, objects)):
            quat = (np.cos(item.yaw / 2), 0.0, 0.0, np.sin(item.yaw / 2))
            mocap = model.body_mocapid[body]
            if mocap >= 0:
                data.mocap_pos[mocap], data.mocap_quat[mocap] = item.position, quat
            else:
                start = model.joint(f"object{index}_free").qposadr[0]
                data.qpos[start : start + 3], data.qpos[start + 3 : start + 7] = item.position, quat
        mujoco.mj_forward(model, data)

    def restore(self, snapshot: Snapshot) -> None:
        data = self.data
        data.qpos[:], data.qvel[:], data.ctrl[:] = snapshot.qpos, snapshot.qvel, snapshot.ctrl
        data.mocap_pos[:], data.mocap_quat[:] = snapshot.mocap_pos, snapshot.mocap_quat
        self._mujoco.mj_forward(self.model, data)

    def advance(self, steps: int) -> None:
        self._mujoco.mj_step(self.model, self.data, nstep=steps)

    def touches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(2, 3) fingertips, (N, 3) object centres, (2, N) contacts, of the last physics step."""
        data = self.data
        contacts = np.zeros((2, len(self._bodies)), bool)
        if data.ncon:
            first, second = data.contact.geom.T
            for a, b in ((first, second), (second, first)):
                hands, objects = self._hand_of[a], self._object_of[b]
                both = (hands >= 0) & (objects >= 0)
                contacts[hands[both], objects[both]] = True
        return data.site_xpos[self._tips].copy(), data.xpos[self._bodies].copy(), contacts

    def current_tips(self) -> np.ndarray:
        self._mujoco.mj_kinematics(self.model, self.data)
        return self.data.site_xpos[self._tips].copy()

    def centres(self) -> np.ndarray:
        return self.data.xpos[self._bodies]

    def render(self, height: int, width: int, camera: str) -> np.ndarray:
        from vla_edge.sim.render import SceneRenderer

        if self._renderer is None:
            self._renderer = SceneRenderer(self.model)
        self._update_poses()
        return self._renderer.render(self.data, height, width, camera)

    def project(self, point: np.ndarray, height: int, width: int, camera: str) -> np.ndarray:
        self._update_poses()
        view = self.data.camera(camera)
        local = view.xmat.reshape(3, 3).T @ (point - view.xpos)
        focal = height / 2 / np.tan(np.deg2rad(self.model.camera(camera).fovy[0]) / 2)
        return np.array((width / 2 - focal * local[0] / local[2], height / 2 + focal * local[1] / local[2]))

    def _update_poses(self) -> None:
        # After a step MuJoCo's poses belong to the state before it.
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_comPos(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
