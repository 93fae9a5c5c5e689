"""Distances between parts of the robot: capsules on a tree of joints, for several postures at once.

The tree comes from YAML in the layout of config/robots/g1_capsules.yaml. Joints that are not driven stand at zero.
Distance between two segments: Ericson, "Real-Time Collision Detection" (2004), section 5.1.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.robots.robot import RobotError

_FEWEST_JOINTS = 4
"""Parts with fewer joints between them are neighbours: their shape and the joint limits keep them apart."""


class CapsuleError(RobotError):
    """A capsule model that contradicts itself or the robot."""


@dataclass(frozen=True)
class _Body:
    name: str
    parent: int
    place: np.ndarray  # (4, 4) in the parent at zero
    joint: str | None
    axis: np.ndarray


class CapsuleModel:
    """Capsules of one robot.

    Args:
        data: plain types as in the YAML.
        joint_names: the J driven joints, in the order of postures.
        source: for errors.

    Attributes:
        names: of the C capsules.
        pairs: names of the P pairs of capsules that are watched.

    Raises:
        CapsuleError: unknown keys, parents or bodies, or a driven joint that the model lacks.
    """

    def __init__(self, data: Mapping, joint_names: tuple[str, ...], source: str = "capsule model"):
        bodies = _read_bodies(data, source)
        index = {body.name: i for i, body in enumerate(bodies)}
        known = {body.joint for body in bodies} | set(data.get("covered") or ())
        missing = [name for name in joint_names if name not in known]
        if missing:
            raise CapsuleError(f"{source} has no body moved by joint {missing[0]!r}, nor is it covered; add it")
        capsules = data["capsules"]
        self.names = tuple(row["name"] for row in capsules)
        for row in capsules:
            if row["body"] not in index:
                raise CapsuleError(f"{source}: capsule {row['name']!r} is on body {row['body']!r}, which is not listed")
        on = [index[row["body"]] for row in capsules]
        pairs = _watched(bodies, on, set(joint_names))
        if not pairs:
            raise CapsuleError(f"{source}: no two capsules are {_FEWEST_JOINTS} joints apart; nothing could be watched")
        self._first, self._second = np.array(pairs).T
        self.pairs = tuple((self.names[a], self.names[b]) for a, b in pairs)
        radius = np.array([row["radius"] for row in capsules], float)
        self._radii = (radius[self._first] + radius[self._second])[:, None]
        carrier, offset = self._build_chain(bodies, joint_names)
        # Both ends of every capsule in the frame of the driven joint that carries it.
        self._carrier = np.array([carrier[i] for i in on])
        ends = np.ones((len(on), 4, 2))
        ends[:, :3, 0], ends[:, :3, 1] = [row["from"] for row in capsules], [row["to"] for row in capsules]
        self._ends = np.stack([offset[i] for i in on]) @ ends

    @staticmethod
    def from_yaml(path: str | Path, joint_names: tuple[str, ...]) -> CapsuleModel:
        """A model from a file. Raises CapsuleError."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CapsuleError(f"capsule model {path} cannot be read: {error}") from error
        return CapsuleModel(data, tuple(joint_names), str(path))

    def distances(self, postures: np.ndarray) -> np.ndarray:
        """(B, P) m between the surfaces of every pair for postures (B, J) rad; negative where they overlap."""
        begin, end = np.ascontiguousarray(self.ends(postures).transpose(3, 2, 1, 0))  # each (3, C, B)
        first, second = self._first, self._second
        return (_between_segments(begin[:, first], end[:, first], begin[:, second], end[:, second]) - self._radii).T

    def ends(self, postures: np.ndarray) -> np.ndarray:
        """(B, C, 3, 2) m, both ends of every capsule in the root's frame."""
        angles = postures[:, self._order, None, None]
        place = np.empty((len(postures), 1 + len(self._order), 4, 4))
        place[:, 0] = np.eye(4)
        place[:, 1:] = self._zero + np.sin(angles) * self._turn + (1.0 - np.cos(angles)) * self._turn_twice
        for parents, children in self._levels:
            place[:, children] = place[:, parents] @ place[:, children]
        return place[:, self._carrier, :3] @ self._ends

    def _build_chain(self, bodies: list[_Body], joint_names: tuple[str, ...]) -> tuple[list[int], list[np.ndarray]]:
        """The tree of driven joints alone, level by level; what lies between two of them is one constant placement.

        Returns of every body the node that carries it (0 is the root) and its placement in that node's frame.
        """
        level, parent, zero, moved = [0], [0], [np.eye(4)], []
        carrier, offset = [], []
        for body in bodies:
            node, place = (0, np.eye(4)) if body.parent < 0 else (carrier[body.parent], offset[body.parent])
            place = place @ body.place
            if body.joint in joint_names:
                level.append(level[node] + 1)
                parent.append(node)
                zero.append(place)
                moved.append(body)
                node, place = len(level) - 1, np.eye(4)
            carrier.append(node)
            offset.append(place)
        order = np.argsort(level, kind="stable")
        number = np.empty(len(order), int)
        number[order] = np.arange(len(order))
        self._order = np.array([joint_names.index(moved[i - 1].joint) for i in order[1:]])
        self._zero = np.stack([zero[i] for i in order[1:]])
        # Rodrigues: R = 1 + sin K + (1 - cos) K^2.
        cross = np.zeros_like(self._zero)
        for row, i in enumerate(order[1:]):
            x, y, z = moved[i - 1].axis
            cross[row, :3, :3] = [[0, -z, y], [z, 0, -x], [-y, x, 0]]
        self._turn = self._zero @ cross
        self._turn_twice = self._turn @ cross
        levels = np.array(level)[order]
        self._levels = []
        for depth in range(1, levels.max() + 1):
            children = np.flatnonzero(levels == depth)
            parents = number[[parent[i] for i in order[children]]]
            self._levels.append((parents, slice(int(children[0]), int(children[-1]) + 1)))
        return [int(number[i]) for i in carrier], offset


def _watched(bodies: list[_Body], on: list[int], driven: set[str]) -> list[tuple[int, int]]:
    """Pairs of capsules that some driven joint moves against each other and that are no neighbours."""
    chains = []
    for i in on:
        chain = set()
        while i >= 0:
            chain.add(i)
            i = bodies[i].parent
        chains.append(chain)
    pairs = []
    for a in range(len(on)):
        for b in range(a + 1, len(on)):
            joints = {bodies[i].joint for i in chains[a] ^ chains[b]} - {None}
            if len(joints) >= _FEWEST_JOINTS and driven & joints:
                pairs.append((a, b))
    return pairs


def _read_bodies(data: Mapping, source: str) -> list[_Body]:
    if not isinstance(data, Mapping) or not {"bodies", "capsules"} <= set(data):
        raise CapsuleError(f"{source} is no capsule model: it needs lists 'bodies' and 'capsules'")
    known = ({"name", "parent", "position", "rotation", "joint", "axis"}, {"name", "body", "from", "to", "radius"})
    for kind, keys in zip(("bodies", "capsules"), known):
        for row in data[kind]:
            if not isinstance(row, Mapping) or set(row) - keys or "name" not in row:
                raise CapsuleError(f"{source}: entry {row!r} of {kind} may have {', '.join(sorted(keys))}")
            if kind == "capsules" and keys - set(row):
                raise CapsuleError(f"{source}: capsule {row['name']!r} lacks {', '.join(sorted(keys - set(row)))}")
    bodies, index = [], {}
    for row in data["bodies"]:
        parent = row.get("parent")
        if parent is not None and parent not in index:
            raise CapsuleError(f"{source}: body {row['name']!r} has parent {parent!r}, which is not listed before it")
        axis = np.array(row.get("axis", (0, 0, 1)), float)
        length = np.linalg.norm(axis)
        if axis.shape != (3,) or not length > 0:
            raise CapsuleError(f"{source}: body {row['name']!r} has axis {axis}; give three numbers, not all zero")
        index[row["name"]] = len(bodies)
        place = _placed(row.get("position", (0, 0, 0)), row.get("rotation", (1, 0, 0, 0)))
        above = -1 if parent is None else index[parent]
        bodies.append(_Body(row["name"], above, place, row.get("joint"), axis / length))
    return bodies


def _placed(position, rotation) -> np.ndarray:
    """(4, 4) from a position in m and a quaternion (w, x, y, z)."""
    w, x, y, z = np.array(rotation, float) / np.linalg.norm(rotation)
    place = np.eye(4)
    place[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    place[:3, 3] = position
    return place


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x[0] * y[0] + x[1] * y[1] + x[2] * y[2]


def _between_segments(a0: np.ndarray, a1: np.ndarray, b0: np.ndarray, b1: np.ndarray) -> np.ndarray:
    """Distance between segments a0-a1 and b0-b1, each (3, ...); segments may be points."""
    along_a, along_b, apart = a1 - a0, b1 - b0, a0 - b0
    aa, bb, ab = _dot(along_a, along_a), _dot(along_b, along_b), _dot(along_a, along_b)
    ac, bc = _dot(along_a, apart), _dot(along_b, apart)
    tiny = 1e-12
    # Closest points of the lines, brought back to the segments one after the other.
    s = np.minimum(np.maximum((ab * bc - ac * bb) / np.maximum(aa * bb - ab * ab, tiny), 0.0), 1.0)
    t = np.minimum(np.maximum((ab * s + bc) / np.maximum(bb, tiny), 0.0), 1.0)
    s = np.minimum(np.maximum((ab * t - ac) / np.maximum(aa, tiny), 0.0), 1.0)
    gap = apart + s * along_a - t * along_b
    return np.sqrt(_dot(gap, gap))
