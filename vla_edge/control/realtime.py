"""Real-time scheduling, affinity, locked memory and awake processors: asked for, and reported when refused."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from vla_edge.control import wake

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_SCHEDULER_RECIPE = (
    "real-time scheduling was refused: add '<user> - rtprio 95' to /etc/security/limits.d/ and log in again, "
    "or start the container with --ulimit rtprio=95 --cap-add SYS_NICE"
)
_MEMORY_RECIPE = (
    "memory locking was refused: add '<user> - memlock unlimited' to /etc/security/limits.d/ and log in again, "
    "or start the container with --ulimit memlock=-1"
)
_WAKEFUL_RECIPE = (
    f"processors may sleep: let the user write {wake.FILE} (udev: KERNEL==\"cpu_dma_latency\", GROUP=\"realtime\", "
    f"MODE=\"0660\"), or start the container with --device {wake.FILE}"
)


@dataclass(frozen=True)
class RealtimeRequest:
    """What to ask the operating system for.

    Attributes:
        priority: SCHED_FIFO priority 1 to 98, 0 for none; 50 is that of ros2_control.
        cpu: processor to stay on, None for any.
        lock_memory: keep every page once touched in memory.
        stay_awake: keep idle processors out of sleep states that take time to leave. It costs power, and is worth most
            on a mostly idle machine: waking a halted virtual processor took 0.8 to 3 ms at the 99th percentile where a
            polling one took 60 to 120 us. Where polling proves later than sleeping they sleep, see `wake`.
    """

    priority: int = 50
    cpu: int | None = None
    lock_memory: bool = True
    stay_awake: bool = True


@dataclass(frozen=True)
class RealtimeGrant:
    """What was granted.

    Attributes:
        scheduler, affinity, memory, awake: granted, or not asked for.
        recipe: what to do about each refusal, empty when everything was granted.
        note: what was not done since it would do harm, and why.
    """

    scheduler: bool
    affinity: bool
    memory: bool
    awake: bool
    recipe: str
    note: str = ""


def request_realtime(request: RealtimeRequest) -> RealtimeGrant:
    """Ask for the calling thread (memory and awake: until the process ends). Refusals are reported, never raised."""
    recipe, note = [], ""
    scheduler = affinity = memory = awake = True
    if request.stay_awake:  # first: it measures, on two processors
        note = wake.keep_awake()
        if note is None:
            awake, note = False, ""
            recipe.append(_WAKEFUL_RECIPE)
    if request.priority:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(request.priority))
        except (OSError, ValueError) as error:
            scheduler = False
            recipe.append(_SCHEDULER_RECIPE if isinstance(error, PermissionError) else f"SCHED_FIFO failed: {error}")
    if request.cpu is not None:
        try:
            os.sched_setaffinity(0, {request.cpu})
        except (OSError, ValueError) as error:
            affinity = False
            allowed = ", ".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
            recipe.append(f"processor {request.cpu} was refused ({error}): choose one of {allowed}")
    if request.lock_memory:
        libc = ctypes.CDLL(None, use_errno=True)
        # ONFAULT locks what is used instead of every mapped stack and library; kernels before 4.4 lack it.
        memory = any(
            libc.mlockall(flags) == 0
            for flags in (_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT, _MCL_CURRENT | _MCL_FUTURE)
        )
        if not memory:
            recipe.append(_MEMORY_RECIPE)
    return RealtimeGrant(scheduler, affinity, memory, awake, "; ".join(recipe), note)


def prioritize(priority: int, threads: Iterable[int] | None = None) -> bool:
    """Real-time scheduling for threads of this process; False where it is refused or not asked for.

    For what stands between sensors and actuators: little work, which must not wait behind inference. Threads made
    later do not inherit it.

    Args:
        priority: of SCHED_FIFO; 0 asks for nothing.
        threads: ids; 0 is the calling one. All there are by now when None.
    """
    if priority <= 0:
        return False
    try:
        for thread in map(int, os.listdir("/proc/self/task")) if threads is None else threads:
            os.sched_setscheduler(thread, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except OSError:
        return False
    return True


def other_threads() -> list[int]:
    """Ids of this process's threads but the calling one."""
    return [int(thread) for thread in os.listdir("/proc/self/task") if int(thread) != threading.get_native_id()]
