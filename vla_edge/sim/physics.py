"""The tabletop's MuJoCo model and state, and where things lie in its arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.episode import TabletopObject
from vla_edge.sim.scene import GROUP_HIDDEN, GROUP_SCENE, HAND_GEOMS, RGBA, build_model
from vla_edge.sim.tasks import HANDS
from vla_edge.types import VlaEdgeError


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


class Physics:
    """One compiled model with its state.

    Attributes:
        model, data: MuJoCo's.
        qpos_index, dof_index: (15,) positions of the driven joints in qpos and qvel.
        lower, upper: (15,) rad, joint limits.
        tier, objects: whose scene it is, and what stands on the table.

    Args:
        tier: "touch" or "hard".
    """

    def __init__(self, tier: str):
        import mujoco

        self.tier, self.objects = tier, ()

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
        self._collides = (model.geom_contype.copy(), model.geom_conaffinity.copy())

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
        model, self.objects = self.model, objects
        for index, item in enumerate(objects):
            shown, hidden = self._cubes[index], self._balls[index]
            if item.shape == "ball":
                shown, hidden = hidden, shown
            for geom, on in ((shown, True), (hidden, False)):
                model.geom_contype[geom] = self._collides[0][geom] if on else 0
                model.geom_conaffinity[geom] = self._collides[1][geom] if on else 0
                model.geom_group[geom] = GROUP_SCENE if on else GROUP_HIDDEN
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
