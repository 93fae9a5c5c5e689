"""Load and heat: when an engine cannot keep its rate, or the computer is too hot, a lighter one serves until that is over.

A pure function of what it is told, with hysteresis in level and in time, so that it never swings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vla_edge.serve.heat import Heat
from vla_edge.types import VlaEdgeError


class DeratingError(VlaEdgeError):
    """Numbers that contradict each other."""


@dataclass(frozen=True)
class DeratingConfig:
    """When to step down, and when back.

    Attributes:
        hot, cool: degrees Celsius at which to step down, and below which stepping back is thought of.
        slow, fast: inference time over the period above which the engine is too slow, and below which the heavier one
            has to stay by what it costs more, before it is given another chance.
        down_after, up_after: s for which it has to be so.
    """

    hot: float = 90.0
    cool: float = 80.0
    slow: float = 1.0
    fast: float = 0.8
    down_after: float = 3.0
    up_after: float = 30.0

    def __post_init__(self):
        if not (self.cool < self.hot and self.fast < self.slow):
            raise DeratingError(
                f"stepping back at {self.cool} degrees and {self.fast} of the period needs to be below stepping down at "
                f"{self.hot} degrees and {self.slow}; or engines would be exchanged without end"
            )


class Derating:
    """Chooses one of several engines, 0 the heaviest.

    Args:
        levels: engines there are.

    Attributes:
        level: engine that is to serve.
        reason: why it is not the heaviest; empty when it is.
    """

    def __init__(self, config: DeratingConfig, levels: int):
        self._config, self._levels = config, levels
        self.level, self.reason = 0, ""
        self._since: float | None = None
        self._wanted = 0
        # How much longer the engine above takes than the one below it, measured at each step down.
        self._costs = [math.nan] * levels
        self._before = math.nan

    def update(self, now: float, load: float, heat: Heat) -> int:
        """The level from now on.

        Args:
            now: s, steady.
            load: inference time of the serving engine over the period, recent 95th percentile; NaN when not known.
            heat: of the computer.
        """
        if self.level and math.isnan(self._costs[self.level]) and not math.isnan(load):
            self._costs[self.level] = max(self._before / load, 1.0)
        why = self._too_much(load, heat)
        wanted = 1 if why else -1 if self.level and self._relaxed(load, heat) else 0
        if wanted != self._wanted or self._since is None:
            self._wanted, self._since = wanted, now
        patience = self._config.down_after if wanted > 0 else self._config.up_after
        if wanted and now - self._since >= patience and 0 <= self.level + wanted < self._levels:
            self.level += wanted
            self._since = None
            if wanted > 0:
                self.reason, self._before = why, load
                self._costs[self.level] = math.nan
            elif not self.level:
                self.reason = ""
        return self.level

    def resume(self, level: int) -> None:
        """An engine that was chosen could not be had: `level` goes on serving."""
        self.level, self._since = level, None
        if not level:
            self.reason = ""

    def _too_much(self, load: float, heat: Heat) -> str:
        config = self._config
        if heat.celsius is not None and heat.celsius >= config.hot:
            return f"{heat.sensor} is at {heat.celsius:.0f} degrees"
        if load > config.slow:
            return f"an inference takes {load:.2f} of a period" + (", processors are throttled" * heat.throttled)
        return ""

    def _relaxed(self, load: float, heat: Heat) -> bool:
        if heat.throttled or heat.celsius is not None and heat.celsius >= self._config.cool:
            return False
        cost = self._costs[self.level]
        # Nothing is known about the engine above's cost when it was left before it inferred: time alone decides.
        return math.isnan(cost) or load * cost < self._config.fast
