"""The last word on every command: position, velocity and acceleration limits that hold for any input.

The command advances on a fixed grid of period h by v' = v + a h, q' = q + v' h, so what an observer computes by finite
differences is exactly what is limited. A joint can always stop before its limit: with D the distance left before a
step,

    v' <= sqrt(2 A D) - A h / 2        that is        (v' + A h / 2)^2 <= 2 A D

leaves D' = D - v' h, and braking by A h in the next step satisfies the same inequality for D' with equality kept term
by term: the set is invariant and never asks for more than A. The same square root, taken of the distance to the
moving reference and with half of A, brings the command back to a reference that the limits have cut.
"""

from __future__ import annotations

import numpy as np

# The finite differences of float64 positions of a few rad carry about 1e-9 rad/s^2 of rounding; staying this far
# inside makes "not one command outside" hold to the last bit and not to a tolerance.
_INSIDE = 1.0 - 1e-6


class Limiter:
    """Follows a reference as closely as the limits of J joints allow.

    Args:
        lower, upper: (J,) rad.
        velocity: (J,) rad/s.
        acceleration: (J,) rad/s^2.
        period: s of the grid.
        catch_up_time: s, time constant of the return to the reference close to it.

    Attributes:
        position: (J,) rad, the command; changes in place.
    """

    def __init__(self, lower, upper, velocity, acceleration, period: float, catch_up_time: float):
        self.lower, self.upper = np.array(lower, float), np.array(upper, float)
        self.velocity_limit, self.acceleration_limit = np.array(velocity, float), np.array(acceleration, float)
        joints = len(self.lower)
        self.period = period
        self.position = np.zeros(joints)
        # Everything below is per step of the grid: rad for velocities, rad for accelerations.
        self._stride, self._last_stride = np.zeros(joints), np.zeros(joints)
        self._rate = period / max(catch_up_time, period)
        self._change = self.acceleration_limit * _INSIDE * period**2
        self._half = 0.5 * self._change
        self._twice = 2.0 * self._change
        self._top = self.velocity_limit * _INSIDE * period
        self._ceiling = self._top.copy()
        self._fraction = 1.0
        # Distances to the upper and to the lower limit are one array: sign * position + bound.
        self._sign = np.array([[-1.0], [1.0]])
        self._bound = np.stack([self.upper, -self.lower])
        self._window = np.zeros((2, joints))
        self._wanted, self._scratch = np.zeros(joints), np.zeros(joints)
        self._cut = np.zeros(joints, bool)

    @property
    def velocity(self) -> np.ndarray:
        """(J,) rad/s, a new array."""
        return self._stride / self.period

    @property
    def acceleration(self) -> np.ndarray:
        """(J,) rad/s^2, a new array."""
        return (self._stride - self._last_stride) / self.period**2

    def velocity_into(self, out: np.ndarray) -> np.ndarray:
        """`velocity` into an array of the caller, (J,) rad/s."""
        return np.divide(self._stride, self.period, out=out)

    def restart(self, position: np.ndarray) -> None:
        """Begin at rest at `position` (J,) rad, brought inside the limits."""
        np.clip(position, self.lower, self.upper, out=self.position)
        self.halt()

    def halt(self) -> None:
        """Take the velocity as zero: the robot stood at the last command while nobody computed the next."""
        self._stride[:] = 0.0
        self._last_stride[:] = 0.0

    def set_velocity_fraction(self, fraction: float) -> None:
        """Scale the velocity limits, 0 to 1; a joint above the new limit brakes within its acceleration limit."""
        if fraction != self._fraction:
            self._fraction = fraction
            np.multiply(self._top, fraction, out=self._ceiling)

    def step(self, before: np.ndarray, after: np.ndarray) -> bool:
        """Advance one period towards a reference that moves from `before` to `after` (both (J,) rad, finite).

        Returns whether a limit changed the command.
        """
        position, stride, wanted, scratch, window = (
            self.position, self._stride, self._wanted, self._scratch, self._window,
        )
        # Return to the reference: proportionally when close, along a braking curve when far.
        np.subtract(before, position, out=wanted)
        np.abs(wanted, out=scratch)
        scratch *= self._change
        np.sqrt(scratch, out=scratch)
        wanted *= self._rate
        np.minimum(wanted, scratch, out=wanted)
        np.negative(scratch, out=scratch)
        np.maximum(wanted, scratch, out=wanted)
        np.subtract(after, before, out=scratch)
        wanted += scratch
        # The window that position and velocity limits leave.
        np.multiply(self._sign, position, out=window)
        window += self._bound
        window *= self._twice
        np.sqrt(window, out=window)
        window -= self._half
        np.maximum(window, 0.0, out=window)
        np.minimum(window, self._ceiling, out=window)
        allowed, low = window
        np.negative(low, out=low)
        np.minimum(wanted, allowed, out=allowed)
        np.maximum(allowed, low, out=allowed)
        # The acceleration limit has the last word; the window never needs more, save for a lowered velocity limit.
        np.add(stride, self._change, out=scratch)
        np.minimum(allowed, scratch, out=allowed)
        np.subtract(stride, self._change, out=scratch)
        np.maximum(allowed, scratch, out=allowed)
        np.not_equal(allowed, wanted, out=self._cut)
        self._last_stride, self._stride = stride, self._last_stride
        self._stride[:] = allowed
        position += allowed
        np.minimum(position, self.upper, out=position)
        np.maximum(position, self.lower, out=position)
        return np.count_nonzero(self._cut) > 0
