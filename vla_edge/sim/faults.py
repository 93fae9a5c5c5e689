"""Faults on command: what goes wrong with sensors and arms on a real robot, for tests and for rehearsing what follows."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from vla_edge.types import NANOSECONDS, JointState, VlaEdgeError


class FaultError(VlaEdgeError):
    """A fault that does not exist, or a size that means nothing."""


@dataclass(frozen=True)
class Faults:
    """What is wrong now; the default is nothing.

    Attributes:
        joint_delay: s that joint states come late, with the stamps they had.
        joint_noise: rad, standard deviation of what is added to each position.
        joint_drop: share of joint states that are lost.
        joint_freeze: positions stand still under new stamps; joint_nan: one of them is not a number.
        image_delay: s that images come late.
        image_shuffle: share of images that are overtaken by the next.
        image_freeze: the last picture again and again under new stamps; image_stop: none at all.
        torque: N.m on the joint `torque_joint`.
        emergency_stop: as if somebody had pressed it.
    """

    joint_delay: float = 0.0
    joint_noise: float = 0.0
    joint_drop: float = 0.0
    joint_freeze: bool = False
    joint_nan: bool = False
    image_delay: float = 0.0
    image_shuffle: float = 0.0
    image_freeze: bool = False
    image_stop: bool = False
    torque: float = 0.0
    torque_joint: str = "right_elbow_joint"
    emergency_stop: bool = False


_RANGES = {
    "joint_delay": (0.0, 5.0),
    "joint_noise": (0.0, 1.0),
    "joint_drop": (0.0, 1.0),
    "image_delay": (0.0, 5.0),
    "image_shuffle": (0.0, 1.0),
    "torque": (-100.0, 100.0),
}


def parse_faults(text: str, joints: tuple[str, ...] | None = None) -> Faults:
    """`joint_noise: 0.01` or `{image_freeze: true, joint_delay: 0.2}` (YAML) -> faults; an empty text means none.

    Args:
        joints: that `torque_joint` may be; not looked at when None.

    Raises:
        FaultError: an unknown fault, or a value out of its range.
    """
    import yaml

    try:
        said = yaml.safe_load(text) or {}
    except yaml.YAMLError:
        said = text
    if not isinstance(said, dict):
        raise FaultError(f"faults {text!r} are not understood; write for example {{joint_noise: 0.01}}")
    known = {item.name: item.default for item in fields(Faults)}
    for name, value in said.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise FaultError(f"there is no fault {name!r}; did you mean {nearest!r}?")
        _check(name, value, known[name])
    faults = Faults(**said)
    if joints is not None and faults.torque_joint not in joints:
        raise FaultError(f"torque_joint is {faults.torque_joint!r}; it must be one of {', '.join(joints)}")
    return faults


def _check(name: str, value, default) -> None:
    if name in _RANGES:
        low, high = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise FaultError(f"fault {name} is {value!r}; it must be a number from {low:g} to {high:g}")
    elif type(value) is not type(default):
        raise FaultError(f"fault {name} is {value!r}; it must be {'true or false' if default is False else 'a name'}")


class Late:
    """Holds things back until their time has come.

    Args:
        pass_on: takes each when it is due.
    """

    def __init__(self, pass_on: Callable[[object], None]):
        self._pass_on, self._waiting = pass_on, deque()

    def put(self, item, now_ns: int, delay: float) -> None:
        """One more, due `delay` s from now."""
        self._waiting.append((now_ns + round(delay * NANOSECONDS), item))
        self.tick(now_ns)

    def tick(self, now_ns: int) -> None:
        """Passes on what is due, in the order in which it came."""
        while self._waiting and self._waiting[0][0] <= now_ns:
            self._pass_on(self._waiting.popleft()[1])


class FaultyJoints:
    """Joint states on their way from the encoders.

    Args:
        publish: takes each that arrives.
    """

    def __init__(self, publish: Callable[[JointState], None], seed: int = 0):
        self._late, self._rng = Late(publish), np.random.default_rng(seed)
        self._frozen: JointState | None = None

    def put(self, state: JointState, now_ns: int, faults: Faults) -> None:
        """A measurement, stamped."""
        if not faults.joint_freeze:
            self._frozen = None
        elif self._frozen is None:
            self._frozen = state
        if self._frozen is not None:
            state = replace(self._frozen, stamp_ns=state.stamp_ns)
        position = state.position.copy()
        if faults.joint_noise:
            position += self._rng.normal(0.0, faults.joint_noise, position.shape)
        if faults.joint_nan:
            position[0] = np.nan
        if not faults.joint_drop or self._rng.random() >= faults.joint_drop:
            self._late.put(replace(state, position=position), now_ns, faults.joint_delay)
        self._late.tick(now_ns)


class FaultyCamera:
    """Pictures, or what they will be drawn from, on their way from the camera.

    Args:
        show: takes the stamp and what is seen, of each that arrives.
    """

    def __init__(self, show: Callable[[int, object], None], seed: int = 0):
        self._late, self._rng = Late(lambda seen: show(*seen)), np.random.default_rng(seed)
        self._frozen = self._overtaken = None

    def put(self, stamp_ns: int, seen: object, now_ns: int, faults: Faults) -> None:
        """What is seen now."""
        self._frozen = (self._frozen or (seen,)) if faults.image_freeze else None
        if self._frozen is not None:
            (seen,) = self._frozen
        if faults.image_stop:
            return
        if self._overtaken is None and faults.image_shuffle and self._rng.random() < faults.image_shuffle:
            self._overtaken = (stamp_ns, seen)
            return
        self._late.put((stamp_ns, seen), now_ns, faults.image_delay)
        if self._overtaken is not None:
            self._late.put(self._overtaken, now_ns, faults.image_delay)
            self._overtaken = None

    def tick(self, now_ns: int) -> None:
        """Passes on what was held back until now."""
        self._late.tick(now_ns)
