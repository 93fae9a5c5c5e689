"""What every runtime on a processor has to know of it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Processor:
    """The first of this computer's processors.

    Attributes:
        name: what the system calls it. Machines of one name can differ in what they can do.
        flags: instruction sets, as Linux writes them; empty where it does not tell.
    """

    name: str
    flags: frozenset[str]


@lru_cache(maxsize=1)
def processor() -> Processor:
    """What it is; the architecture's name where the system does not tell."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    part = f"{platform.machine()} part {facts['CPU part']}" if "CPU part" in facts else ""
    name = facts.get("model name") or part or platform.processor() or platform.machine()
    return Processor(name, frozenset((facts.get("flags") or facts.get("Features") or "").split()))


def sums_saturate() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits, which saturates: x86-64 without VNNI."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not processor().flags & {"avx_vnni", "avx512_vnni"}
