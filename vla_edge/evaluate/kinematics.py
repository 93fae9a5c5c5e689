"""Where the links at the ends of a robot's chains are, from its URDF: joint errors in rad become millimetres.

Forward kinematics as the URDF specification has it: each joint's origin (xyz, then roll, pitch, yaw about fixed axes),
then its rotation about, or shift along, its axis.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla_edge.types import VlaEdgeError


class KinematicsError(VlaEdgeError):
    """A URDF that cannot be read, or that does not have the joints or links asked for."""


class Kinematics:
    """End effectors of one robot.

    Args:
        urdf: path of a URDF file.
        joint_names: the J joints that move; all others stay at zero.
        links: end effectors; when None, the last link of every chain that a joint of `joint_names` moves.

    Attributes:
        links: their names.

    Raises:
        KinematicsError: see above.
    """

    def __init__(self, urdf: str | Path, joint_names: Sequence[str], links: Sequence[str] | None = None):
        try:
            root = ElementTree.parse(urdf).getroot()
            joints = [_read(element) for element in root.findall("joint")]
        except (OSError, ElementTree.ParseError, AttributeError, ValueError) as error:
            raise KinematicsError(f"URDF {urdf} cannot be read: {error}; give a plain URDF, not a xacro file") from None
        self._column = {name: i for i, name in enumerate(joint_names)}
        missing = sorted(set(joint_names) - {joint["name"] for joint in joints})
        if missing:
            raise KinematicsError(f"URDF {urdf} has no joint {', '.join(missing[:3])}, which the policy moves")
        self._above = {joint["child"]: joint for joint in joints}
        parents = {joint["parent"] for joint in joints}
        ends = [joint["child"] for joint in joints if joint["child"] not in parents]
        self.links = tuple(links) if links is not None else tuple(link for link in ends if self._moves(link))
        unknown = [link for link in self.links if link not in self._above]
        if unknown or not self.links:
            raise KinematicsError(f"URDF {urdf} has no link {', '.join(unknown) or 'that these joints move'}; its ends "
                                  f"are {', '.join(ends)}")  # fmt: skip

    def positions(self, joints: np.ndarray) -> np.ndarray:
        """(..., J) rad -> (..., L, 3) m, in the frame of the robot's root link."""
        joints = np.asarray(joints, np.float64)
        flat = joints.reshape(-1, joints.shape[-1])
        out = np.stack([self._place(link, flat) for link in self.links], axis=1)
        return out.reshape(*joints.shape[:-1], len(self.links), 3)

    def _place(self, link: str, joints: np.ndarray) -> np.ndarray:
        """(N, 3) m: from the link's origin up to the root, one joint after another."""
        points = np.zeros((len(joints), 3))
        for joint in self._chain(link):
            column = self._column.get(joint["name"])
            if column is not None and joint["kind"] == "prismatic":
                points = points + joints[:, column, None] * joint["axis"]
            elif column is not None:
                points = _rotate(points, joint["axis"], joints[:, column, None])
            points = points @ joint["rotation"].T + joint["xyz"]
        return points

    def _chain(self, link: str):
        while link in self._above:
            joint = self._above[link]
            yield joint
            link = joint["parent"]

    def _moves(self, link: str) -> bool:
        return any(joint["name"] in self._column for joint in self._chain(link))


def _read(element) -> dict:
    origin, axis = element.find("origin"), element.find("axis")
    xyz, rpy = (_vector(origin.get(key) if origin is not None else None) for key in ("xyz", "rpy"))
    direction = _vector(axis.get("xyz")) if axis is not None else np.array([1.0, 0.0, 0.0])
    return {
        "name": element.get("name"), "kind": element.get("type"), "parent": element.find("parent").get("link"),
        "child": element.find("child").get("link"), "xyz": xyz, "rotation": _from_rpy(*rpy),
        "axis": direction / (np.linalg.norm(direction) or 1.0),
    }  # fmt: skip


def _vector(text: str | None) -> np.ndarray:
    return np.array([float(part) for part in (text or "0 0 0").split()])


def _from_rpy(roll: float, pitch: float, yaw: float) -> np.ndarray:
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _rotate(points: np.ndarray, axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rodrigues' rotation of (N, 3) points by (N, 1) angles."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return points * cosine + np.cross(axis, points) * sine + axis * (points @ axis)[:, None] * (1 - cosine)
