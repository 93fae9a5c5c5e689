"""Whether idle processors had better poll than sleep: measured, since some lose wake-ups when they poll."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import median

FILE = "/dev/cpu_dma_latency"
PAIRS, PAUSE_S, MOST_APART_US = 256, 0.001, 16
PROMPT_NS = 300_000
MOST_LOST, TIMES = 0.01, 2.0
"""Polling is given up where more of its wake-ups are lost than that, and that many times more than by sleeping."""

_WOKEN = """
import os, time
late = []
os.write(1, b".")
while stamp := os.read(0, 8):
    late.append(time.monotonic_ns() - int.from_bytes(stamp, "little"))
os.write(1, b" ".join(b"%d" % ns for ns in late))
"""


@dataclass(frozen=True)
class Wakes:
    """How soon a process on another processor wakes.

    Attributes:
        late_ns: how late after a pause; the median.
        lost: fraction of wake-ups right after another that came late although that one was prompt.
    """

    late_ns: float
    lost: float


@functools.cache
def keep_awake() -> str | None:
    """No processor sleeps until this process ends, unless wake-ups are lost that way.

    Returns:
        An empty string when none sleeps; a sentence when they are left to sleep; None when it was refused. Takes half a
        second, once.
    """
    try:
        # As long as the file is open, the kernel keeps to what was written last; at first that is nothing.
        file = os.open(FILE, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return None
    asleep = wakes()
    try:
        os.write(file, struct.pack("i", 0))
    except OSError:
        os.close(file)
        return None
    polling = wakes()
    if asleep and polling and asleep.late_ns < PROMPT_NS and polling.lost > max(MOST_LOST, TIMES * asleep.lost):
        os.close(file)
        return (
            f"idle processors are left to sleep, from which a thread wakes within {asleep.late_ns / 1e3:.0f} us here: "
            f"while they poll, {100 * polling.lost:.0f} % of close wake-ups are lost until the next timer tick"
        )
    return ""  # nobody closes the file


def wakes(pairs: int = PAIRS) -> Wakes | None:
    """How a process on another processor wakes; None where that cannot be measured.

    It is woken in pairs, by the second at times just while it goes back to sleep. That wake-up was seen to be lost on a
    processor that polls (Linux 6.18 in a virtual machine, haltpoll), until its next timer tick, 4 ms later: a camera's
    message right behind one of the joints then came late every other time. Where other work keeps the
    processor busy already the first of a pair is late, and the pair tells nothing.
    """
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        return None
    here, there = sorted(allowed)[:2]
    try:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WOKEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        ) as woken:
            try:
                woken.stdout.read(1)
                os.sched_setaffinity(woken.pid, {there})
                os.sched_setaffinity(0, {here})
                with contextlib.suppress(OSError):  # so that less of what else runs there counts
                    os.sched_setscheduler(woken.pid, os.SCHED_FIFO, os.sched_param(1))
                for number in range(pairs):
                    time.sleep(PAUSE_S)
                    _wake(woken)
                    second_ns = time.monotonic_ns() + 1000 * (number % MOST_APART_US)
                    while time.monotonic_ns() < second_ns:
                        pass
                    _wake(woken)
                said, _ = woken.communicate(timeout=2.0)
            finally:
                os.sched_setaffinity(0, allowed)
                woken.kill()
    except (OSError, subprocess.SubprocessError):
        return None
    late = list(map(int, said.split()))
    firsts, seconds = late[0::2], late[1::2]
    judged = [second for first, second in zip(firsts, seconds) if first < PROMPT_NS]
    return Wakes(median(firsts), sum(second > PROMPT_NS for second in judged) / len(judged) if judged else 0.0)


def _wake(woken: subprocess.Popen) -> None:
    os.write(woken.stdin.fileno(), time.monotonic_ns().to_bytes(8, "little"))
