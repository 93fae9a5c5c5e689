"""How much of this computer other programs take meanwhile, by the system's own counts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

COUNTS = Path("/proc/stat")
# columns of it behind a processor's name; guests' time is in those before already
_IDLE, _ALL = slice(3, 5), slice(0, 8)
QUIET = 0.25
"""Processors that others may take while ways of running are timed, without a word."""


class OtherPrograms:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._begin = _seconds()

    def processors(self) -> float | None:
        """As many as other programs, and other machines on the same hardware, have kept busy in the mean since, of those
        that this process may use; None where the system does not tell."""
        if self._begin is None:
            return None
        busy, mine, passed = (now - before for now, before in zip(_seconds(), self._begin))
        return max(0.0, (busy - mine) / passed)


def caution(manifest: Mapping) -> str:
    """What to say of the computer that a bundle's ways of running were timed on; nothing of a quiet one, or where it is not
    known."""
    processors = manifest.get("machine", {}).get("taken_by_others")
    if not processors or processors <= QUIET:
        return ""
    return (
        f"other programs kept {processors:.1f} processors busy while ways of running were timed; on a quiet computer others "
        "may be faster, of threads above all; build again on one (--force, force:=true)"
    )


def _seconds() -> tuple[float, float, float] | None:
    """That processors were busy, that this process and the ended ones of its own were, and that have passed."""
    passed = time.monotonic()
    own = os.times()
    try:
        rows = [line.split() for line in COUNTS.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    mine = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    counts = [[int(count) for count in row[1:]] for row in rows if row and row[0] in mine]
    busy = sum(sum(row[_ALL]) - sum(row[_IDLE]) for row in counts) / os.sysconf("SC_CLK_TCK")
    return (busy, sum(own[:4]), passed) if counts else None
