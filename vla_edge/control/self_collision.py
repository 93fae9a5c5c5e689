"""Slows the robot down where its parts come close to each other, and stops it before they touch.

Looks along the way on which the robot would come to rest if it began to stop now. Only pairs that are coming closer
count, so that a robot which is too close may always move apart.
"""

from __future__ import annotations

import numpy as np

from vla_edge.control.capsules import CapsuleModel
from vla_edge.control.spline import LEAST_STOP, stop_time

_ALONG = np.array([0.0, 0.25, 0.5, 0.75, 1.0])[:, None]
"""Where to look on the way to rest: thin parts may have passed each other at its end."""
_NEAR = 0.002
"""m beyond the stopping distance within which a robot that has stopped counts as too close."""
_CLOSER = 1e-5
"""m by which a pair has to come closer to count."""


class SelfCollision:
    """Speed that the distances between the robot's parts allow.

    Args:
        model: capsules of the driven joints.
        stop, slow: m, distances at which it stands, and from which it slows down.
        deceleration, jerk: (J,) rad/s^2 and rad/s^3 of a planned stop.
        every: ticks between looks.

    Attributes:
        speed: allowed fraction, 0 to 1, as of the last look.
        nearest: m, the smallest distance watched as of the last look.
    """

    def __init__(
        self, model: CapsuleModel, stop: float, slow: float, deceleration: np.ndarray, jerk: np.ndarray,
        every: int,
    ):
        self._model, self._stop, self._range = model, stop, max(slow - stop, 1e-6)
        self._deceleration, self._jerk = deceleration, jerk
        self._postures = np.zeros((len(_ALONG), len(deceleration)))
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

    def look(self, command: np.ndarray) -> float:
        """Speed allowed at a running command (3, J): rad, rad/s, rad/s^2."""
        position, velocity, acceleration = command
        # How long and far the stop goes that `spline.stop_coefficients` plans.
        seconds = stop_time(velocity, acceleration, self._deceleration, self._jerk, LEAST_STOP)
        np.multiply(_ALONG, 0.5 * seconds * velocity + seconds * seconds / 12.0 * acceleration, self._postures)
        self._postures += position
        distances = self._model.distances(self._postures)
        now, then = distances[0], distances[1:].min(axis=0)
        self.nearest = float(now.min())
        closing = np.where(then < now - _CLOSER, then, np.inf)
        self._pair = int(closing.argmin())
        self.speed = min(max((float(closing[self._pair]) - self._stop) / self._range, 0.0), 1.0)
        return self.speed

    def forbids(self, position: np.ndarray, postures: np.ndarray) -> bool:
        """Whether going from `position` (J,) rad to some `postures` (B, J) brings closer what is too close already.

        Braking alone would let a robot that is sent there again and again creep on.
        """
        if self.nearest > self._stop + _NEAR:
            return False
        distances = self._model.distances(np.vstack([position, postures]))
        return bool((distances[1:].min(axis=0) < np.minimum(distances[0], self._stop + _NEAR) - _CLOSER).any())

    def reason(self) -> str:
        """What the last look saw, in words."""
        first, second = self._model.pairs[self._pair]
        return f"{first} and {second} would come closer than {self._stop * 1e3:.0f} mm"
