"""Where a fingertip wants to go: smooth velocity fields for touching an object and for pushing it.

Both are functions of the moment alone. Neither rushes: the tip goes over the object first and then down to it, and
sideways only as far as its height allows, so that nothing else is touched on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_edge.sim.episode import TABLE_TOP

HOVER_M = 0.01
"""Fingertip above the touch point at the end of a touch."""
PUSH_HEIGHT_M = 0.045
"""Fingertip above the table while pushing: the lower finger just clears it."""

_SPEED, _GAIN = 0.65, 6.0
_PUSH_SPEED = 0.3
# Height above the target while away from it, and the distances between which the funnel comes down. Into the gap beside
# an object it comes down steeply, or the hand would brush the neighbour.
_TOUCH_FUNNEL, _PUSH_FUNNEL = (0.085, 0.02, 0.11), (0.11, 0.015, 0.06)
_FINGER_M = 0.013
_BEHIND_M = 0.02
_AHEAD_M = 0.012
"""The tip goes a little past the middle of the side it pushes, so that both fingers lie against it."""


@dataclass(frozen=True)
class Situation:
    """What the field depends on besides the joints, for B states.

    Attributes:
        centre: (B, 3) m, of the named object.
        half_height: (B,) m, of the named object.
        side: 0 to touch it; +1 or -1, in the sense of y, to push it.
        wanted_y: (B,) m, where to push its centre to.
    """

    centre: np.ndarray
    half_height: np.ndarray
    side: float
    wanted_y: np.ndarray

    @property
    def touch_point(self) -> np.ndarray:
        """(B, 3) m: the middle of the object's top."""
        point = self.centre.copy()
        point[:, 2] += self.half_height
        return point

    def after(self, tips: np.ndarray) -> Situation:
        """The same once fingertips (B, 3) stand where they stand: a pushed object is ahead of the finger."""
        if self.side == 0:
            return self
        reach = self.half_height + _FINGER_M
        ahead = tips[:, 1] + self.side * reach
        low = (tips[:, 2] < TABLE_TOP + 0.08) & (np.abs(tips[:, 0] - self.centre[:, 0]) < 0.03)
        behind = (tips[:, 1] - self.centre[:, 1]) * self.side < 0
        pushed = low & behind & ((ahead - self.centre[:, 1]) * self.side > 0)
        centre = self.centre.copy()
        centre[pushed, 1] = ahead[pushed]
        return Situation(centre, self.half_height, self.side, self.wanted_y)


def tip_velocity(tips: np.ndarray, situation: Situation) -> np.ndarray:
    """(B, 3) m/s for fingertips (B, 3) m."""
    if situation.side == 0:
        target = situation.touch_point
        target[:, 2] += HOVER_M
        return _limited(_funnel(tips, target, *_TOUCH_FUNNEL), _SPEED)
    return _push(tips, situation)


def _funnel(tips: np.ndarray, target: np.ndarray, clearance: float, inner: float, outer: float) -> np.ndarray:
    """(B, 3) m/s towards the target, high above it while far from it."""
    way = target - tips
    away = np.sqrt(way[:, 0] ** 2 + way[:, 1] ** 2)
    way[:, 2] += clearance * _smooth((away - inner) / (outer - inner))
    way[:, :2] *= np.clip(1.0 - (way[:, 2:] - 0.01) / 0.05, 0.05, 1.0)
    return _GAIN * way


def _push(tips: np.ndarray, situation: Situation) -> np.ndarray:
    """Down into the gap behind the object, then along, as far as the finger stands behind it and low; then rest."""
    side, reach = situation.side, situation.half_height + _FINGER_M
    behind = situation.centre.copy()
    behind[:, 0] += _AHEAD_M
    behind[:, 1] -= side * (reach + _BEHIND_M)
    behind[:, 2] = TABLE_TOP + PUSH_HEIGHT_M
    goal = behind.copy()
    goal[:, 1] = situation.wanted_y - side * reach
    gap = (situation.centre[:, 1] - tips[:, 1]) * side - reach
    ready = _smooth((0.035 - np.abs(tips[:, 0] - behind[:, 0])) / 0.02)
    ready *= _smooth((TABLE_TOP + PUSH_HEIGHT_M + 0.035 - tips[:, 2]) / 0.02)
    ready *= _smooth((gap + 0.03) / 0.015)
    ready = ready[:, None]
    approach = _limited(_funnel(tips, behind, *_PUSH_FUNNEL), _SPEED)
    push = _limited(_GAIN * (goal - tips), _PUSH_SPEED)
    missing = (situation.wanted_y - situation.centre[:, 1]) * side
    return (approach * (1 - ready) + push * ready) * _smooth((missing + 0.002) / 0.008)[:, None]


def _limited(velocity: np.ndarray, speed: float) -> np.ndarray:
    length = np.sqrt((velocity * velocity).sum(1, keepdims=True))
    return velocity * np.minimum(1.0, speed / np.maximum(length, 1e-9))


def _smooth(x: np.ndarray) -> np.ndarray:
    x = np.minimum(np.maximum(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)
