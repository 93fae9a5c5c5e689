"""The whole-chunk check: a chunk is followed entirely or not at all."""

from __future__ import annotations

import math

import numpy as np

from vla_edge.control.config import ControlConfig
from vla_edge.types import NANOSECONDS, ActionChunk, VlaEdgeError

REJECTIONS = (
    "joints", "shape", "finite", "dt", "future", "stale", "order", "position", "velocity", "first_step", "mode", "held",
    "yield", "operator", "collision",
)
"""Reasons a chunk is refused for, in the order they are looked at."""

MAX_POINTS = 256
"""Longest chunk taken; a policy's are 8 to 100."""


class RejectedChunk(VlaEdgeError):
    """A chunk was refused as a whole; `reason` is one of REJECTIONS."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(f"chunk rejected ({reason}): {sentence}")
        self.reason = reason


class Screening:
    """Checks chunks against the joints, clock and limits.

    Args:
        joint_names: the J joints expected, in command order.
        lower, upper: (J,) rad.
        velocity: (J,) rad/s.
    """

    def __init__(self, joint_names: tuple[str, ...], lower, upper, velocity, config: ControlConfig):
        self._names = joint_names
        self._lower, self._upper = np.array(lower), np.array(upper)
        self._fastest = np.array(velocity) * config.chunk_velocity_ratio
        self._config = config

    def check(self, chunk: ActionChunk, now_ns: int, newest_ns: int | None, not_before_ns: int) -> np.ndarray:
        """Positions (T, J) in command order, inside the limits.

        Args:
            newest_ns: stamp of the newest chunk accepted so far, None for none.
            not_before_ns: earliest observation a chunk may answer.

        Raises:
            RejectedChunk
        """
        config, positions = self._config, chunk.positions
        if chunk.joint_names != self._names:
            if len(chunk.joint_names) != len(self._names) or set(chunk.joint_names) != set(self._names):
                odd = sorted(set(chunk.joint_names) ^ set(self._names))
                raise RejectedChunk("joints", f"joints differ from the controller's in {', '.join(odd) or 'number'}")
            positions = positions[:, [chunk.joint_names.index(name) for name in self._names]]
        if not 2 <= len(positions) <= MAX_POINTS:
            raise RejectedChunk("shape", f"{len(positions)} points; between 2 and {MAX_POINTS} are taken")
        if not np.isfinite(positions).all():
            row, column = np.argwhere(~np.isfinite(positions))[0]
            raise RejectedChunk("finite", f"point {row} of {self._names[column]} is {positions[row, column]}")
        if not (math.isfinite(chunk.dt) and 0.001 <= chunk.dt <= 1.0):
            raise RejectedChunk("dt", f"time between points is {chunk.dt} s; 0.001 to 1 s are taken")
        age = (now_ns - chunk.stamp_ns) / NANOSECONDS
        if age < -config.future_tolerance:
            raise RejectedChunk("future", f"its observation is {-age:.3f} s in the future; synchronize the clocks")
        if age > config.max_chunk_age or age >= len(positions) * chunk.dt:
            raise RejectedChunk("stale", f"its observation is {age:.3f} s old; inference or transport is too slow")
        if newest_ns is not None and chunk.stamp_ns <= newest_ns:
            raise RejectedChunk("order", "a chunk with this or a newer stamp is already being followed")
        if chunk.stamp_ns < not_before_ns:
            raise RejectedChunk("order", "its observation is from before the controller was armed")
        outside = np.maximum(self._lower - positions, positions - self._upper).max(axis=0)
        worst = int(outside.argmax())
        if outside[worst] > config.position_tolerance:
            raise RejectedChunk("position", f"{self._names[worst]} goes {outside[worst]:.3f} rad beyond its limit")
        steps = np.abs(np.diff(positions, axis=0)).max(axis=0) / (chunk.dt * self._fastest)
        clipped = outside[worst] > 0.0
        worst = int(steps.argmax())
        if steps[worst] > 1.0:
            raise RejectedChunk(
                "velocity",
                f"{self._names[worst]} moves at {steps[worst] * self._fastest[worst]:.2f} rad/s; "
                f"{self._fastest[worst]:.2f} is the most taken",
            )
        return np.clip(positions, self._lower, self._upper) if clipped else positions

    def check_first_step(self, command: np.ndarray, entry: np.ndarray) -> None:
        """Raise RejectedChunk when the chunk at its entry (J,) is too far from the running command (J,)."""
        distance = np.abs(entry - command)
        worst = int(distance.argmax())
        if not distance[worst] <= self._config.max_first_step:
            raise RejectedChunk(
                "first_step",
                f"{self._names[worst]} would have to move {distance[worst]:.3f} rad at once; max_first_step is "
                f"{self._config.max_first_step} rad",
            )
