"""What the robot did: joint positions over a stretch of time, looked up by joint name and interpolated in time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from vla_edge.types import NANOSECONDS, freeze

# Between samples further apart than this the robot's path is unknown, so nothing is interpolated.
MAX_GAP_S = 0.1
# Faster than any joint of any robot we know: the world was reset, or the encoder wrapped.
TELEPORT_RAD_S = 40.0
TELEPORT_RAD = 0.05


@dataclass(frozen=True)
class JointTrajectory:
    """Sampled joint positions.

    Attributes:
        names: J joint names.
        stamps_ns: (N,) int64, strictly increasing.
        positions: (N, J) rad.
        until_ns: from here on the trajectory no longer answers the question it was cut out for (another instruction
            was given, or a simulation was reset); None where it holds to its last sample.
    """

    names: tuple[str, ...]
    stamps_ns: np.ndarray
    positions: np.ndarray
    until_ns: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "stamps_ns", freeze(self.stamps_ns, np.int64, (None,), "JointTrajectory.stamps_ns"))
        shape = (len(self.stamps_ns), len(self.names))
        object.__setattr__(self, "positions", freeze(self.positions, np.float64, shape, "JointTrajectory.positions"))

    def at(self, stamps_ns: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
        """(len(stamps_ns), len(names)) rad by linear interpolation; NaN where it is not known.

        Not known is: before the first and after the last sample, inside a gap longer than `MAX_GAP_S`, at and after
        `until_ns`, and for joints that are not in `names`.
        """
        wanted = np.asarray(stamps_ns, np.int64)
        out = np.full((len(wanted), len(names)), np.nan)
        if not len(self.stamps_ns):
            return out
        after = np.searchsorted(self.stamps_ns, wanted, side="left").clip(0, len(self.stamps_ns) - 1)
        before = np.where(self.stamps_ns[after] == wanted, after, after - 1).clip(0)
        low, high = self.stamps_ns[before], self.stamps_ns[after]
        known = (low <= wanted) & (wanted <= high) & (high - low <= MAX_GAP_S * NANOSECONDS)
        if self.until_ns is not None:
            known &= wanted < self.until_ns
        weight = np.where(high > low, (wanted - low) / np.maximum(high - low, 1), 0.0)[:, None]
        index = {name: i for i, name in enumerate(self.names)}
        columns = [i for i, name in enumerate(names) if name in index]
        source = [index[names[i]] for i in columns]
        values = self.positions[before][:, source] * (1 - weight) + self.positions[after][:, source] * weight
        out[:, columns] = np.where(known[:, None], values, np.nan)
        return out


class JointWindow:
    """The recent past of one joint topic: enough to answer for the frames still waiting, and no more.

    Args:
        names: the J joints kept.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self._samples: deque[tuple[int, np.ndarray, object]] = deque()
        self._jumps: deque[int] = deque()

    @property
    def newest_ns(self) -> int | None:
        """Stamp of the last sample."""
        return self._samples[-1][0] if self._samples else None

    def add(self, stamp_ns: int, position: np.ndarray, source: object) -> bool:
        """Appends a sample of (J,) rad and what it was read from; False when its stamp is not newer than the last."""
        if self._samples:
            last_ns, last, _ = self._samples[-1]
            elapsed = stamp_ns - last_ns
            if elapsed <= 0:
                return False
            moved = np.abs(position - last).max(initial=0.0)
            if moved > TELEPORT_RAD + TELEPORT_RAD_S * elapsed / NANOSECONDS:
                self._jumps.append(stamp_ns)
        self._samples.append((stamp_ns, position, source))
        return True

    def as_of(self, stamp_ns: int) -> tuple[int, object] | None:
        """Stamp and source of the newest sample that is not newer than `stamp_ns`."""
        for stamp, _, source in reversed(self._samples):
            if stamp <= stamp_ns:
                return stamp, source
        return None

    def between(self, start_ns: int, end_ns: int, until_ns: int | None = None) -> JointTrajectory:
        """The samples from the one at or before `start_ns` to the one at or after `end_ns`, cut at the next jump."""
        samples = list(self._samples)
        stamps = np.fromiter((sample[0] for sample in samples), np.int64, len(samples))
        first = max(int(np.searchsorted(stamps, start_ns, side="right")) - 1, 0)
        last = min(int(np.searchsorted(stamps, end_ns, side="left")) + 1, len(stamps))
        rows = np.reshape([sample[1] for sample in samples[first:last]], (-1, len(self.names)))
        limits = [jump for jump in self._jumps if jump > start_ns] + ([until_ns] if until_ns is not None else [])
        return JointTrajectory(self.names, stamps[first:last], rows, min(limits, default=None))

    def forget_before(self, stamp_ns: int) -> None:
        """Drops what no frame at or after `stamp_ns` can ask for, keeping the sample just before it."""
        while len(self._samples) > 1 and self._samples[1][0] <= stamp_ns:
            self._samples.popleft()
        while self._jumps and self._jumps[0] <= stamp_ns:
            self._jumps.popleft()

    def clear(self) -> None:
        """Forgets everything, as after a jump of the clock."""
        self._samples.clear()
        self._jumps.clear()
