"""From the steady clock to another and back."""

from __future__ import annotations

import time
from collections.abc import Callable

# Two readings follow each other within a microsecond unless something came between them.
_UNDISTURBED_NS = 20_000
_TRIES = 4


def offset_ns(clock: Callable[[], int] = time.time_ns) -> int:
    """What to add to `time.monotonic_ns()` to get `clock()`.

    The clock is read between two readings of the steady one. When the processor was taken away in between, the result
    would be wrong by as long: then it is read again, and the closest pair counts.
    """
    best = offset = None
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        now = clock()
        after = time.monotonic_ns()
        if best is None or after - before < best:
            best, offset = after - before, now - (before + after) // 2
        if best < _UNDISTURBED_NS:
            break
    return offset
