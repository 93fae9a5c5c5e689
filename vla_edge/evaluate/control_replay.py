"""Chunks through the robot's own controller on a virtual clock: what the joints would have been told.

The robot of a recording does not follow, of course; but every chunk begins where the robot then was, so the commands
stay near it, and what the controller has to cut, refuse or bridge is what it would have had to on the robot. Where a
chunk begins too far from the commands it is refused and counted, and the controller armed anew where the robot is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlError, ControlKernel
from vla_edge.control.screening import RejectedChunk
from vla_edge.evaluate.serving import PAUSE_S, Served, VirtualServer
from vla_edge.robots.robot import Robot
from vla_edge.types import NANOSECONDS, ActionChunk, JointState

# Coarser than live: a tick is a few numpy calls, and an hour of recording has to pass in minutes.
CONTROL_HZ = 200


@dataclass(frozen=True)
class ControlSummary:
    """What the controller made of an engine's chunks.

    Attributes:
        delay_s: from an observation to its chunk, as assumed.
        steps: ticks of the controller.
        accepted: chunks followed. rejected: reason -> chunks refused.
        limit_hits: ticks in which a limit changed the command.
        holds: times it ran out of chunks, starts of a recorded stretch apart.
        jerk_rms: root mean square over joints and ticks of the command's third derivative, rad/s^3.
        jerk_rms_per_joint: the same of each joint.
    """

    delay_s: float
    steps: int
    accepted: int
    rejected: Mapping[str, int]
    limit_hits: int
    holds: int
    jerk_rms: float
    jerk_rms_per_joint: Mapping[str, float]

    @property
    def rejected_fraction(self) -> float:
        """Share of the chunks that were refused."""
        total = self.accepted + sum(self.rejected.values())
        return sum(self.rejected.values()) / total if total else float("nan")


class ControlReplay:
    """One controller, fed an engine's chunks in the order of their observations.

    Args:
        robot: joint table with working limits.
        joint_names: of the policy.
        delay_s: from an observation to its chunk; with more than the observations' period, some go unserved.

    Raises:
        RobotError: the robot lacks a joint of the policy.
    """

    def __init__(self, robot: Robot, joint_names: Sequence[str], delay_s: float):
        # Recordings hold joint states at whatever rate; live, their silence is the watchdog's business.
        config = ControlConfig(
            tick_rate=CONTROL_HZ, command_rate=CONTROL_HZ, start_ramp=0.0, joint_state_timeout=5.0, max_chunk_age=10.0
        )
        self._kernel = ControlKernel(robot, tuple(joint_names), config)
        self._delay_s, self._period_ns = delay_s, config.period_ns
        self._server = VirtualServer()
        self._underway: deque[Served] = deque()
        self._now_ns: int | None = None
        self._newest_ns, self._state = 0, None
        self._recent: deque[np.ndarray] = deque(maxlen=4)
        self._squares, self._samples = np.zeros(len(joint_names)), 0

    def add(self, chunk: ActionChunk, state: JointState) -> None:
        """One chunk, and the joints measured at its observation."""
        stamp_ns = chunk.stamp_ns
        pause = not 0 <= stamp_ns - self._newest_ns <= PAUSE_S * NANOSECONDS
        self._newest_ns, self._state = stamp_ns, state
        if pause or self._now_ns is None:
            self._finish()
            self._restart(state, stamp_ns)
        self._run_until(stamp_ns)
        self._kernel.update_joints(state, self._now_ns)
        self._underway.extend(self._server.offer(stamp_ns, round(self._delay_s * NANOSECONDS), chunk))

    def summary(self) -> ControlSummary:
        """Everything so far."""
        self._finish()
        counters, mean = self._kernel.counters, self._squares / max(self._samples, 1)
        return ControlSummary(
            self._delay_s,
            counters.steps,
            counters.accepted,
            {reason: count for reason, count in counters.rejected.items() if count},
            counters.limit_hits,
            counters.holds,
            float(np.sqrt(mean.mean())),
            dict(zip(self._kernel.joint_names, np.sqrt(mean).tolist())),
        )

    def _restart(self, state: JointState, stamp_ns: int) -> None:
        self._recent.clear()
        self._now_ns = stamp_ns
        try:
            self._kernel.rearm(state, stamp_ns)
        except ControlError:
            pass  # the recorded robot stands outside its limits: chunks are then refused, and counted as that

    def _finish(self) -> None:
        """Ends a recorded stretch with the chunks that are still on their way."""
        self._underway.extend(self._server.flush())
        if self._underway:
            self._run_until(self._underway[-1].done_ns + self._period_ns)

    def _run_until(self, stamp_ns: int) -> None:
        kernel, recent = self._kernel, self._recent
        while self._now_ns + self._period_ns <= stamp_ns:
            while self._underway and self._underway[0].done_ns <= self._now_ns:
                try:
                    kernel.accept_chunk(self._underway.popleft().item, self._now_ns)
                except RejectedChunk as error:  # the kernel counts it
                    if error.reason == "first_step":
                        self._restart(self._state, self._now_ns)
            self._now_ns += self._period_ns
            if kernel.advance(self._now_ns):
                recent.append(kernel.position.copy())
                if len(recent) == 4:
                    jerk = (recent[3] - 3 * recent[2] + 3 * recent[1] - recent[0]) * float(CONTROL_HZ) ** 3
                    self._squares += jerk**2
                    self._samples += 1
