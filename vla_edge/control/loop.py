"""A loop on absolute deadlines: no drift, and no tick skipped without being counted."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from vla_edge.control.lateness import LatenessHistogram
from vla_edge.types import NANOSECONDS

_CLOCK_MONOTONIC = 1
_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class AbsoluteSleep:
    """`clock_nanosleep` to absolute times of the steady clock.

    Python 3.10's time.sleep takes only a duration (and uses select), from which a loop drifts.
    """

    def __init__(self):
        self._call = ctypes.CDLL(None).clock_nanosleep
        self._call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Timespec), ctypes.c_void_p)
        self._until = _Timespec()
        self._pointer = ctypes.pointer(self._until)

    def until(self, deadline_ns: int) -> int:
        """Sleep until `deadline_ns` of time.monotonic_ns(), or until a signal; returns the time then, ns."""
        self._until.seconds, self._until.nanoseconds = divmod(deadline_ns, NANOSECONDS)
        self._call(_CLOCK_MONOTONIC, _TIMER_ABSTIME, self._pointer, None)
        return time.monotonic_ns()


class DeadlineLoop:
    """Calls `tick` once per period with the deadline it is for.

    When a tick comes so late that further deadlines have passed, `tick` is called once with the newest of them: it is
    told the time and makes up for it, and the deadlines passed are counted in `overruns`.

    Args:
        period_ns: ns between deadlines.
        tick: called with the deadline on the steady clock, ns; keeps going until `stop` is called.
        sleep: replaces the operating system's sleep, for tests.

    Attributes:
        lateness: wake-up time minus deadline, of every tick.
        overruns: deadlines that passed before their tick could run.
        ticks: calls made.
    """

    def __init__(
        self, period_ns: int, tick: Callable[[int], None], sleep: Callable[[int], int] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ):
        self.period_ns = period_ns
        self.lateness = LatenessHistogram()
        self.overruns = 0
        self.ticks = 0
        self._tick = tick
        self._sleep = sleep or AbsoluteSleep().until
        self._clock = clock
        self._running = False

    def run(self) -> None:
        """Tick until `stop`, from a whole number of periods on, so that equal loops share their grid."""
        period, tick, sleep, lateness = self.period_ns, self._tick, self._sleep, self.lateness
        deadline = (self._clock() // period + 2) * period
        self._running = True
        while self._running:
            now = sleep(deadline)
            late = now - deadline
            if late < 0:
                continue  # a signal woke us
            lateness.add(late)
            if late >= period:
                passed = late // period
                self.overruns += passed
                deadline += passed * period
            self.ticks += 1
            tick(deadline)
            deadline += period

    def stop(self) -> None:
        """End `run` after the present tick; may be called from a signal handler or from the tick."""
        self._running = False
