"""Slows the robot down where its parts come close to each other, and stops it before they touch.

Looks where the robot would stand if it began to stop now. Only pairs that are coming closer count, so that a robot
which is too close may always move apart.
"""

from __future__ import annotations

import numpy as np

from vla_edge.control.capsules import CapsuleModel
from vla_edge.control.spline import LEAST_STOP

_CLOSER = 1e-5
"""m by which a pair has to come closer to count."""


class SelfCollision:
    """Speed that the distances between the robot's parts allow.

    Args:
        model: capsules of the driven joints.
        stop, slow: m, distances at which it stands, and from which it slows down.
        deceleration: (J,) rad/s^2 of a planned stop.
        every: ticks between looks.

    Attributes:
        speed: allowed fraction, 0 to 1, as of the last look.
        nearest: m, the smallest distance watched as of the last look.
    """

    def __init__(self, model: CapsuleModel, stop: float, slow: float, deceleration: np.ndarray, every: int):
        self._model, self._stop, self._range = model, stop, max(slow - stop, 1e-6)
        self._deceleration = deceleration
        self._postures = np.zeros((2, len(deceleration)))
        self.speed, self.nearest = 1.0, float("inf")
        self._pair = 0
        self._every, self._countdown = every, 1

    def due(self) -> bool:
        """Whether this tick, told by calling, is one to look in."""
        self._countdown -= 1
        if self._countdown > 0:
            return False
        self._countdown = self._every
        return True

    def look(self, position: np.ndarray, velocity: np.ndarray) -> float:
        """Speed allowed at a command (J,) rad that moves at (J,) rad/s."""
        postures = self._postures
        postures[0] = position
        # A planned stop lasts 1.5 |v| / deceleration and goes half as far as its first speed would.
        seconds = max(float(np.max(1.5 * np.abs(velocity) / self._deceleration)), LEAST_STOP)
        np.multiply(velocity, 0.5 * seconds, postures[1])
        postures[1] += position
        now, then = self._model.distances(postures)
        self.nearest = float(now.min())
        closing = np.where(then < now - _CLOSER, then, np.inf)
        self._pair = int(closing.argmin())
        self.speed = min(max((float(closing[self._pair]) - self._stop) / self._range, 0.0), 1.0)
        return self.speed

    def reason(self) -> str:
        """What the last look saw, in words."""
        first, second = self._model.pairs[self._pair]
        return f"{first} and {second} would come closer than {self._stop * 1e3:.0f} mm"
