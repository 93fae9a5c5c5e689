"""The nouns that flow through vla_edge: what the robot saw, what the policy wants, what the motors are told.

Everything is SI (rad, rad/s, N.m, s), float64 and matched by joint name, never by position in a list.
Stamps are integer nanoseconds on the ROS clock, as in a message header: two nouns with the same stamp speak of
exactly the same moment, which a float could not promise. Arrays are frozen so that a value can cross threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

NANOSECONDS = 1_000_000_000


class VlaEdgeError(Exception):
    """Base of every named error: one sentence that says what is wrong, where, and what to do."""


def freeze(array, dtype=np.float64, shape: tuple[int | None, ...] | None = None, what: str = "array") -> np.ndarray:
    """A read-only, contiguous copy of `array`.

    Args:
        shape: expected shape, None where any length is allowed.

    Raises:
        ValueError: the shape differs.
    """
    frozen = np.array(array, dtype=dtype, order="C")
    if shape is not None and (
        frozen.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, frozen.shape))
    ):
        raise ValueError(f"{what} has shape {frozen.shape}, expected {shape}")
    frozen.setflags(write=False)
    return frozen


@dataclass(frozen=True)
class JointState:
    """Measured joints at one moment.

    Attributes:
        stamp_ns: time of the measurement, ns.
        names: J joint names.
        position: (J,) rad.
        velocity: (J,) rad/s, zeros when the source does not measure it.
        effort: (J,) N.m, zeros when the source does not measure it.
    """

    stamp_ns: int
    names: tuple[str, ...]
    position: np.ndarray
    velocity: np.ndarray = None  # type: ignore[assignment]
    effort: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        for name in ("position", "velocity", "effort"):
            value = getattr(self, name)
            value = np.zeros(len(self.names)) if value is None else value
            object.__setattr__(self, name, freeze(value, shape=(len(self.names),), what=f"JointState.{name}"))


@dataclass(frozen=True)
class Observation:
    """What the policy is shown: aligned camera frames, joints and the instruction.

    Attributes:
        stamp_ns: the moment the observation speaks of (the newest camera frame), ns. Chunks are placed by it.
        images: camera name -> (H, W, 3) uint8 RGB.
        joints: joint state at or interpolated to `stamp_ns`.
        instruction: natural language.
        before: what was observed before it, oldest first, for policies that read several observations; theirs are
            not looked at.
    """

    stamp_ns: int
    images: Mapping[str, np.ndarray]
    joints: JointState
    instruction: str
    before: tuple[Observation, ...] = ()

    def last(self, count: int) -> tuple[Observation, ...]:
        """The newest `count` observations, this one last; the oldest is repeated where there are fewer."""
        known = (*self.before, self)[-count:]
        return (known[0],) * (count - len(known)) + known


@dataclass(frozen=True)
class ActionChunk:
    """Absolute joint targets at absolute times.

    Attributes:
        stamp_ns: stamp of the observation the chunk answers, ns.
        joint_names: J names.
        positions: (T, J) rad; row i is the target at `stamp_ns + (i + 1) * dt`.
        dt: s between rows.
    """

    stamp_ns: int
    joint_names: tuple[str, ...]
    positions: np.ndarray
    dt: float

    def __post_init__(self):
        object.__setattr__(self, "joint_names", tuple(self.joint_names))
        object.__setattr__(
            self, "positions", freeze(self.positions, shape=(None, len(self.joint_names)), what="ActionChunk.positions")
        )

    @property
    def horizon(self) -> float:
        """Seconds from the observation to the last target."""
        return len(self.positions) * self.dt


@dataclass(frozen=True)
class JointCommand:
    """What the joints are told for one moment.

    Attributes:
        stamp_ns: the time the command is for, ns.
        names: J names.
        position: (J,) rad target.
        velocity: (J,) rad/s feed-forward.
        effort: (J,) N.m feed-forward.
    """

    stamp_ns: int
    names: tuple[str, ...]
    position: np.ndarray
    velocity: np.ndarray
    effort: np.ndarray


@dataclass(frozen=True)
class InferenceTiming:
    """Where the time of one inference went, s.

    Attributes:
        preprocess: image, text and state preparation.
        stages: stage name -> seconds, summed over its calls.
        postprocess: from the last stage's output to the chunk.
        total: wall time of the whole call.
        passes: of a language model, over tokens of the chunk; 0 where it writes none.
        decoded: tokens that those passes told.
    """

    preprocess: float
    stages: Mapping[str, float] = field(default_factory=dict)
    postprocess: float = 0.0
    total: float = 0.0
    passes: int = 0
    decoded: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """With a draft, the accepted ones and the model's own; NaN where no tokens are written."""
        return self.decoded / self.passes if self.passes else math.nan
