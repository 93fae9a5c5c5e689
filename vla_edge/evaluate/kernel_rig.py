"""What the worlds of the closed loop share: the controller of the robot, ticked on episode time."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlKernel
from vla_edge.control.screening import RejectedChunk
from vla_edge.robots.robot import Robot
from vla_edge.types import NANOSECONDS, ActionChunk, JointCommand, JointState

# Every episode has the same clock, or its noise would depend on the episodes before it.
EPISODE_START_NS = NANOSECONDS


class KernelRig(ABC):
    """A world behind `control.kernel.ControlKernel`, for `closed_loop.Rig`.

    The controller is armed with its start ramp behind it, as on a robot that has been up for a while. A world says what
    its joints measure (`_joints`) and lets a command act up to a moment (`_act`).

    Attributes:
        kernel: the controller of the running episode.
    """

    kernel: ControlKernel | None = None
    _now_ns: int = 0

    @abstractmethod
    def _joints(self) -> JointState:
        """Measured last, on episode time."""

    @abstractmethod
    def _act(self, command: JointCommand | None, until_ns: int) -> None:
        """The world up to `until_ns` of episode time, in whole steps of its own."""

    def _arm(self, robot: Robot, joint_names: tuple[str, ...], control_hz: float, **config) -> None:
        """A controller at the start of an episode, whose world stands as it will begin."""
        rate, self._now_ns = round(control_hz), EPISODE_START_NS
        config = ControlConfig(tick_rate=rate, command_rate=rate, start_ramp=0.0, **config)
        self.kernel = ControlKernel(robot, joint_names, config)
        self.kernel.rearm(self._joints(), self.now_ns)

    @property
    def now_ns(self) -> int:
        """Episode time of the controller; the world follows in whole steps of its own."""
        return self._now_ns

    def tick(self, seconds: float) -> None:
        """One command, and the world up to the next."""
        self.kernel.update_joints(self._joints(), self.now_ns)
        command = self.kernel.tick(self.now_ns)
        self._now_ns += round(seconds * NANOSECONDS)
        self._act(command, self._now_ns)

    def accept(self, chunk: ActionChunk) -> bool:
        """Hands a chunk to the controller; False when it is rejected."""
        try:
            self.kernel.accept_chunk(chunk, self.now_ns)
        except RejectedChunk:
            return False
        return True

    def commanded(self) -> np.ndarray:
        """(J,) in the unit of the joints, a copy."""
        return self.kernel.position.copy()

    def counted(self) -> dict:
        """What the controller counted, as `EpisodeRow` names it."""
        counters = self.kernel.counters
        return {
            "limit_hits": counters.limit_hits,
            "holds": counters.holds,
            "rejections": {reason: count for reason, count in counters.rejected.items() if count},
        }
