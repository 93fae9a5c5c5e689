"""The payload of a joint state message -> the joints asked for, matched by name and checked, as plain data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_edge.types import JointState, VlaEdgeError


class JointStateError(VlaEdgeError):
    """A joint state that must not be used: joints missing, of unequal lengths, or not finite."""


class JointStateReader:
    """Picks `joint_names` out of whatever order and company a robot reports them in.

    Args:
        joint_names: the J joints wanted, in the order wanted.
    """

    def __init__(self, joint_names: Sequence[str]):
        self.joint_names = tuple(joint_names)
        self._names: tuple[str, ...] | None = None
        self._index: np.ndarray | None = None

    def __call__(self, stamp_ns: int, names: Sequence[str], position, velocity=(), effort=()) -> JointState:
        """The J joints as one `JointState`; velocity and effort are zero where the message leaves them out.

        Raises:
            JointStateError: a joint is missing or named twice, an array has another length than the names, or a
                position, velocity or effort is not finite.
        """
        if (names := tuple(names)) != self._names:
            self._index, self._names = self._find(names), names
        fields = (("position", position), ("velocity", velocity), ("effort", effort))
        return JointState(stamp_ns, self.joint_names, *(self._pick(what, values) for what, values in fields))

    def _find(self, names: tuple[str, ...]) -> np.ndarray:
        position = {name: i for i, name in enumerate(names)}
        missing = [name for name in self.joint_names if name not in position]
        if missing:
            raise JointStateError(
                f"the joint state lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}; "
                "every joint of the policy must be in each message"
            )
        if len(position) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise JointStateError(f"the joint state names {twice} twice; its publisher must name each joint once")
        return np.array([position[name] for name in self.joint_names])

    def _pick(self, what: str, values) -> np.ndarray | None:
        values = np.asarray(values, np.float64)
        if not values.size and what != "position":
            return None
        if values.shape != (len(self._names),):
            raise JointStateError(
                f"the joint state has {len(self._names)} names and {values.size} values of {what}; "
                "its publisher must send one each"
            )
        picked = values[self._index]
        if not np.isfinite(picked).all():
            bad = self.joint_names[int(np.flatnonzero(~np.isfinite(picked))[0])]
            raise JointStateError(f"the {what} of {bad} is not finite; check the encoder or its driver")
        return picked
