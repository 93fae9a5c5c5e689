"""Real-time scheduling, processor affinity and locked memory: asked for, and reported when refused."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_SCHEDULER_RECIPE = (
    "real-time scheduling was refused: add '<user> - rtprio 95' to /etc/security/limits.d/ and log in again, "
    "or start the container with --ulimit rtprio=95 --cap-add SYS_NICE"
)
_MEMORY_RECIPE = (
    "memory locking was refused: add '<user> - memlock unlimited' to /etc/security/limits.d/ and log in again, "
    "or start the container with --ulimit memlock=-1"
)


@dataclass(frozen=True)
class RealtimeRequest:
    """What to ask the operating system for.

    Attributes:
        priority: SCHED_FIFO priority 1 to 98, 0 for none; 50 is that of ros2_control.
        cpu: processor to stay on, None for any.
        lock_memory: keep every page once touched in memory.
    """

    priority: int = 50
    cpu: int | None = None
    lock_memory: bool = True


@dataclass(frozen=True)
class RealtimeGrant:
    """What was granted.

    Attributes:
        scheduler, affinity, memory: granted, or not asked for.
        recipe: what to do about each refusal, empty when everything was granted.
    """

    scheduler: bool
    affinity: bool
    memory: bool
    recipe: str


def request_realtime(request: RealtimeRequest) -> RealtimeGrant:
    """Ask for the calling thread (memory: the process). Refusals are reported, never raised."""
    recipe = []
    scheduler = affinity = memory = True
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
    return RealtimeGrant(scheduler, affinity, memory, "; ".join(recipe))
