"""A person who moves the robot: what was commanded last, since when, and whether there is still somebody."""

from __future__ import annotations

import numpy as np

from vla_edge.control.watchdog import Watchdog
from vla_edge.types import VlaEdgeError


class OperatorError(VlaEdgeError):
    """An operator's command that cannot be carried out."""


class Operator:
    """The operator's side of a controller of J joints.

    Args:
        timeout_ns: ns of silence that end a turn.
        reach: rad, largest distance of the first command of a turn from the running one.

    Attributes:
        target: (J,) rad, where the robot is to go; changes in place.
        began_ns, ended_ns: of the newest turn, 0 where there was none or it goes on.
    """

    def __init__(self, joint_names: tuple[str, ...], timeout_ns: int, reach: float):
        self._names, self._reach = joint_names, reach
        self.presence = Watchdog(timeout_ns)
        self.target = np.zeros(len(joint_names))
        self.began_ns = self.ended_ns = 0

    def check(self, target: np.ndarray, position: np.ndarray, first: bool) -> None:
        """Raise OperatorError for a target (J,) rad, NaN for joints not named, that cannot be gone to from `position`.

        Args:
            first: of a turn.
        """
        named = ~np.isnan(target)
        if not np.isfinite(target[named]).all():
            raise OperatorError("the operator's command is not finite")
        distance = np.abs(np.where(named, target - position, 0.0))
        worst = int(distance.argmax())
        if first and distance[worst] > self._reach:
            raise OperatorError(
                f"the operator's {self._names[worst]} is {distance[worst]:.2f} rad from the robot's; bring it within "
                f"max_first_step {self._reach:g} rad to take over"
            )

    def begin(self, position: np.ndarray, now_ns: int) -> None:
        """A turn begins where the command is, (J,) rad."""
        self.target[:] = position
        self.began_ns, self.ended_ns = now_ns, 0

    def end(self, now_ns: int) -> None:
        """The turn is over."""
        self.ended_ns = now_ns

    def aim(self, target: np.ndarray, lower: np.ndarray, upper: np.ndarray, now_ns: int) -> np.ndarray:
        """The whole target for a command that may name some joints only, inside position limits."""
        np.copyto(self.target, target, where=~np.isnan(target))
        self.presence.feed(now_ns)
        return np.clip(self.target, lower, upper, out=self.target)
