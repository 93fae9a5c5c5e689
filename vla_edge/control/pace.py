"""How fast time runs along a chunk: what was asked for, the start ramp, and caution while ticks come late."""

from __future__ import annotations

from vla_edge.control.config import ControlConfig
from vla_edge.types import NANOSECONDS

_LEAST_RAMP = 0.1
"""Fraction of the velocity limits the start ramp begins at."""


class Pace:
    """Speed along the chunk, 0 to 1, which changes no faster than `speed_scale_rate`.

    Attributes:
        scale: speed asked for from outside.
        speed: speed now.
        allowance: fraction of the speed asked for that the surroundings allow.
        cautious: whether ticks came late within the last `overload_recovery`.
    """

    def __init__(self, config: ControlConfig):
        self._config = config
        self._most = config.speed_scale_rate * config.period
        self._ramp_length_ns = config.start_ramp * NANOSECONDS
        self._recovery_ns = config.overload_recovery * NANOSECONDS
        self._ramp_ns: int | None = None
        self._late_ns: int | None = None
        self.scale = 1.0
        self.allowance = 1.0
        self.speed = 1.0

    @property
    def cautious(self) -> bool:
        return self._late_ns is not None

    def restart(self, now_ns: int) -> None:
        """Begin a start ramp at `now_ns`."""
        self._ramp_ns = now_ns if self._ramp_length_ns else None
        self._late_ns = None
        self.allowance = 1.0
        self.speed = 0.0 if self._ramp_ns is not None else self.scale

    def late(self, now_ns: int) -> None:
        """A tick came too late at `now_ns`."""
        self._late_ns = now_ns

    def ramp(self, now_ns: int) -> float:
        """Smooth 0 to 1 over the start ramp."""
        if self._ramp_ns is None:
            return 1.0
        u = (now_ns - self._ramp_ns) / self._ramp_length_ns
        if u >= 1.0:
            self._ramp_ns = None
            return 1.0
        return u * u * (3.0 - 2.0 * u)

    def velocity_fraction(self, now_ns: int) -> float:
        """Of the velocity limits that may be used."""
        return 1.0 if self._ramp_ns is None else max(self.ramp(now_ns), _LEAST_RAMP)

    def step(self, now_ns: int) -> float:
        """Speed for the grid period that ends at `now_ns`."""
        target = self.scale * self.allowance
        if self._ramp_ns is not None:
            target = min(target, self.ramp(now_ns))
        if self._late_ns is not None:
            if now_ns - self._late_ns > self._recovery_ns:
                self._late_ns = None
            else:
                target *= self._config.overload_speed
        if target != self.speed:
            self.speed += min(max(target - self.speed, -self._most), self._most)
        return self.speed
