"""Percentiles of the latest durations: what diagnostics say about a stage."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class LatencySummary:
    """Durations in s; NaN while nothing was measured.

    Attributes:
        count: durations ever added.
        p50, p95, p99, maximum: of those in the window.
    """

    count: int
    p50: float
    p95: float
    p99: float
    maximum: float


class RollingLatency:
    """The last `window` durations. Safe to add to and to read from different threads."""

    def __init__(self, window: int = 1000):
        self._values: deque[float] = deque(maxlen=window)
        self._count = 0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """One more duration."""
        with self._lock:
            self._values.append(seconds)
            self._count += 1

    def summary(self) -> LatencySummary:
        """Percentiles of the window."""
        with self._lock:
            values, count = sorted(self._values), self._count
        if not values:
            return LatencySummary(0, *[float("nan")] * 4)
        return LatencySummary(count, *(_quantile(values, share) for share in (0.50, 0.95, 0.99)), values[-1])


def _quantile(ordered: list[float], share: float) -> float:
    """Linear between neighbours, as numpy's default, which takes ten times as long for so few and is in a chunk's way."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class StageLatencies:
    """One `RollingLatency` for each named stage, in the order they were first seen."""

    def __init__(self, window: int = 1000):
        self._window = window
        self._stages: dict[str, RollingLatency] = {}

    def add(self, stage: str, seconds: float) -> None:
        """One more duration of `stage`."""
        self._stages.setdefault(stage, RollingLatency(self._window)).add(seconds)

    def summaries(self) -> dict[str, LatencySummary]:
        """stage -> percentiles."""
        return {stage: latency.summary() for stage, latency in list(self._stages.items())}
