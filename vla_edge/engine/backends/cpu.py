"""What every runtime on a processor has to know of it."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

MOST_THREADS = 8


def threads_worth_trying() -> list[int]:
    """One, and as many as there are processors for this process."""
    available = len(os.sched_getaffinity(0))
    return [1] if available == 1 else [1, min(available, MOST_THREADS)]


def threads_to_use(built: int | None, at_most: int | None) -> int:
    """`built`, within `at_most` and the processors there are."""
    return min(built or 1, at_most or os.cpu_count() or 1, len(os.sched_getaffinity(0)))


@lru_cache(maxsize=1)
def sums_saturate() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits, which saturates: x86-64 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return True
    return not flags & {"avx_vnni", "avx512_vnni"}
