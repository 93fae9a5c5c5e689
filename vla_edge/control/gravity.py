"""The torque that holds the robot against gravity, from a model of its masses.

MuJoCo reads MJCF and URDF, Pinocchio URDF; whichever is installed is used, and neither is imported without a model. The
base stands upright and still, joints that are not driven stand at zero.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import numpy as np

from vla_edge.types import VlaEdgeError


class GravityError(VlaEdgeError):
    """A gravity model that cannot be used."""


class Gravity(Protocol):
    """Torques against gravity."""

    def torque(self, position: np.ndarray) -> np.ndarray:
        """(J,) N.m that hold the joints at (J,) rad."""


def load_gravity(path: str | Path, joint_names: tuple[str, ...]) -> Gravity:
    """A model from an MJCF or URDF file.

    Raises:
        GravityError: no file, no library that reads it, or a joint it does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise GravityError(f"gravity model {path} does not exist; give the path of an MJCF or URDF file")
    readers = [("mujoco", MujocoGravity)]
    if path.suffix.lower() == ".urdf":
        readers.insert(0, ("pinocchio", PinocchioGravity))
    for module, reader in readers:
        if importlib.util.find_spec(module) is not None:
            try:
                return reader(path, joint_names)
            except GravityError:
                raise
            except Exception as error:  # noqa: BLE001 - each library raises its own
                raise GravityError(f"gravity model {path} cannot be read by {module}: {error}") from error
    raise GravityError(f"reading gravity model {path} needs {' or '.join(name for name, _ in readers)}; install one")


class MujocoGravity:
    """Gravity by MuJoCo's recursive Newton-Euler algorithm.

    Args:
        path: of an MJCF or URDF file.
        joint_names: the J driven joints.
    """

    def __init__(self, path: Path, joint_names: tuple[str, ...]):
        import mujoco

        self._mujoco = mujoco
        self._model = mujoco.MjModel.from_xml_path(str(path))
        self._data = mujoco.MjData(self._model)
        indices = [mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_JOINT, name) for name in joint_names]
        if min(indices) < 0:
            missing = joint_names[indices.index(min(indices))]
            raise GravityError(f"gravity model {path} has no joint {missing!r}; use the model of this robot")
        self._places, self._degrees = self._model.jnt_qposadr[indices], self._model.jnt_dofadr[indices]

    def torque(self, position: np.ndarray) -> np.ndarray:
        """See `Gravity`."""
        mujoco, model, data = self._mujoco, self._model, self._data
        data.qpos[self._places] = position
        # Only what gravity needs: places of the masses, then the torques at rest.
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_rne(model, data, 0, data.qfrc_bias)
        return data.qfrc_bias[self._degrees]


class PinocchioGravity:
    """Gravity by Pinocchio; arguments as for MujocoGravity."""

    def __init__(self, path: Path, joint_names: tuple[str, ...]):
        import pinocchio

        self._compute = pinocchio.computeGeneralizedGravity
        self._model = pinocchio.buildModelFromUrdf(str(path))
        self._data = self._model.createData()
        self._position = pinocchio.neutral(self._model)
        self._places, self._degrees = [], []
        for name in joint_names:
            if not self._model.existJointName(name):
                raise GravityError(f"gravity model {path} has no joint {name!r}; use the model of this robot")
            joint = self._model.joints[self._model.getJointId(name)]
            if joint.nq != 1:
                raise GravityError(f"gravity model {path}: joint {name!r} turns without end, which is not supported")
            self._places.append(joint.idx_q)
            self._degrees.append(joint.idx_v)

    def torque(self, position: np.ndarray) -> np.ndarray:
        """See `Gravity`."""
        self._position[self._places] = position
        return self._compute(self._model, self._data, self._position)[self._degrees]
