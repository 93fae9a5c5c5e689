"""Which observations an engine would have served in time, and how old its chunks were when the robot used them.

On a virtual clock, with the latencies that were measured or assumed: one inference at a time, always on the newest
observation, none queued, as `serve.inference_loop` does it live.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vla_edge.evaluate.metrics import Percentiles
from vla_edge.types import NANOSECONDS

# Observations further apart belong to different stretches of a recording: nothing is late between them.
PAUSE_S = 1.0


class Served(NamedTuple):
    """One inference: the stamp of its observation, when its chunk is there (ns), and what was offered with it."""

    stamp_ns: int
    done_ns: int
    item: object


class VirtualServer:
    """Serves what it is offered, in order of stamps.

    Attributes:
        offered: observations so far.
    """

    def __init__(self):
        self.offered = 0
        self._free_ns: int | None = None
        self._newest_ns: int | None = None
        self._waiting: tuple[int, int, object] | None = None

    def offer(self, stamp_ns: int, latency_ns: int, item: object = None) -> Iterator[Served]:
        """Gives the inferences that begin up to `stamp_ns`, the moment this observation is there."""
        self.offered += 1
        if self._newest_ns is not None and not 0 <= stamp_ns - self._newest_ns <= PAUSE_S * NANOSECONDS:
            yield from self.flush()
            self._free_ns = None
        self._newest_ns = stamp_ns
        if self._waiting is not None and self._free_ns < stamp_ns:
            yield from self.flush()
        if self._free_ns is None or self._free_ns <= stamp_ns:
            yield self._serve(stamp_ns, (stamp_ns, latency_ns, item))
        else:
            self._waiting = (stamp_ns, latency_ns, item)

    def flush(self) -> Iterator[Served]:
        """Gives the inference that is still waiting for the one before it."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            yield self._serve(max(self._free_ns, waiting[0]), waiting)

    def _serve(self, begin_ns: int, what: tuple[int, int, object]) -> Served:
        stamp_ns, latency_ns, item = what
        self._free_ns = begin_ns + latency_ns
        return Served(stamp_ns, self._free_ns, item)


@dataclass(frozen=True)
class ServingSummary:
    """How timely an engine of these latencies is at this rate.

    Attributes:
        offered, served: observations, and those of them that were inferred on.
        rate_hz: chunks per second of the stretches that were recorded without a pause.
        staleness_ms: age of the observation behind a chunk at the moment the next chunk replaces it: the oldest
            picture the robot ever acts on.
    """

    offered: int
    served: int
    rate_hz: float
    staleness_ms: Percentiles

    @property
    def served_fraction(self) -> float:
        """Share of the observations that became chunks."""
        return self.served / self.offered if self.offered else float("nan")


class ServingTally:
    """Collects a `ServingSummary`, an inference at a time."""

    def __init__(self):
        self._server = VirtualServer()
        self._last: Served | None = None
        self._ages_ms: list[float] = []
        self._served, self._spacing_ns, self._spacings = 0, 0, 0

    def add(self, stamp_ns: int, latency_s: float) -> None:
        """One observation and how long its inference takes."""
        for served in self._server.offer(stamp_ns, round(latency_s * NANOSECONDS)):
            self._note(served)

    def summary(self) -> ServingSummary:
        """Everything so far."""
        for served in self._server.flush():
            self._note(served)
        rate = NANOSECONDS * self._spacings / self._spacing_ns if self._spacing_ns else float("nan")
        return ServingSummary(self._server.offered, self._served, rate, Percentiles.of(self._ages_ms))

    def _note(self, served: Served) -> None:
        self._served += 1
        last, self._last = self._last, served
        if last is not None and 0 < served.stamp_ns - last.stamp_ns <= 2 * PAUSE_S * NANOSECONDS:
            self._ages_ms.append((served.done_ns - last.stamp_ns) / 1e6)
            self._spacing_ns += served.stamp_ns - last.stamp_ns
            self._spacings += 1
