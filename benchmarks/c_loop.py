"""The least a periodic loop costs on this machine: clock_nanosleep to absolute deadlines in C, and nothing else.

Compiled when it is run, with what `cc` is there. Asks for what the controller asks for: SCHED_FIFO, locked memory and
awake processors; what is refused it goes without, as the controller does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int count, char **given) {
    long long period = atoll(given[1]), ticks = atoll(given[2]);
    int zero = 0, awake = open("/dev/cpu_dma_latency", O_WRONLY);
    if (awake >= 0 && write(awake, &zero, sizeof zero) < 0) awake = -1;
    struct sched_param priority = {.sched_priority = atoi(given[3])};
    int scheduled = sched_setscheduler(0, SCHED_FIFO, &priority) == 0;
    int locked = mlockall(MCL_CURRENT | MCL_FUTURE) == 0;
    long long *late = calloc(ticks, sizeof *late), deadline = now() + period;
    for (long long i = 0; i < ticks; i++, deadline += period) {
        struct timespec until = {deadline / 1000000000LL, deadline % 1000000000LL};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        late[i] = now() - deadline;
    }
    fprintf(stderr, "scheduler %d memory %d awake %d\n", scheduled, locked, awake >= 0);
    fwrite(late, sizeof *late, ticks, stdout);
    return 0;
}
"""


def lateness_us(rate: int, seconds: float, priority: int = 50) -> tuple[np.ndarray, str]:
    """(us late of every tick, what was granted). Raises RuntimeError where there is no C compiler or it fails."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler (cc) on the path; install gcc to compare with a loop in C")
    with tempfile.TemporaryDirectory(prefix="vla_edge_c_loop_") as directory:
        source, program = Path(directory) / "loop.c", Path(directory) / "loop"
        source.write_text(SOURCE)
        built = subprocess.run([compiler, "-O2", "-o", program, source], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"{compiler} failed: {built.stderr.strip()[:200]}")
        arguments = [str(10**9 // rate), str(round(rate * seconds)), str(priority)]
        done = subprocess.run([program, *arguments], capture_output=True, timeout=seconds * 3 + 30, check=True)
    return np.frombuffer(done.stdout, np.int64) / 1e3, done.stderr.decode().strip()


TIMER = """
import sys, time
import rclpy
period, seconds = float(sys.argv[1]), float(sys.argv[2])
rclpy.init()
node = rclpy.create_node("naive_timer")
times = []
timer = node.create_timer(period, lambda: times.append(time.monotonic_ns()))
end = time.monotonic() + seconds
while time.monotonic() < end:
    rclpy.spin_once(node, timeout_sec=0.1)
sys.stdout.write(" ".join(map(str, times)))
"""


def timer_lateness_us(rate: int, seconds: float) -> np.ndarray:
    """us late of every call of an rclpy timer, on the grid that begins with its first call."""
    done = subprocess.run(
        [sys.executable, "-c", TIMER, str(1.0 / rate), str(seconds)], capture_output=True, text=True,
        timeout=seconds * 3 + 60, check=True,
    )
    times = np.array(done.stdout.split(), np.int64)
    return (times - times[0] - np.arange(len(times)) * (10**9 // rate)) / 1e3
