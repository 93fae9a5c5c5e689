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
from numpy import absolute, add, count_nonzero, maximum, minimum, multiply, negative, not_equal, sqrt, subtract

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
        self._change = self.acceleration_limit * _INSIDE * period**2
        # Upper and lower window are the rows of one array; the constants have its shape, broadcasting being slow.
        self._half = np.tile(0.5 * self._change, (2, 1))
        self._twice = np.tile(2.0 * self._change, (2, 1))
        self._top = np.tile(self.velocity_limit * _INSIDE * period, (2, 1))
        self._ceiling = self._top.copy()
        self._zero = np.zeros((2, joints))
        self._fraction = 1.0
        self._window = np.zeros((2, joints))
        self._high, self._low = self._window
        self._wanted, self._scratch = np.zeros(joints), np.zeros(joints)
        self._rates = np.full(joints, period / max(catch_up_time, period))
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
        position, stride, wanted, scratch = self.position, self._stride, self._wanted, self._scratch
        window, allowed, low, change = self._window, self._high, self._low, self._change
        # Return to the reference: proportionally when close, along a braking curve when far.
        subtract(before, position, wanted)
        absolute(wanted, scratch)
        multiply(scratch, change, scratch)
        sqrt(scratch, scratch)
        multiply(wanted, self._rates, wanted)
        minimum(wanted, scratch, out=wanted)
        negative(scratch, scratch)
        maximum(wanted, scratch, out=wanted)
        subtract(after, before, scratch)
        add(wanted, scratch, wanted)
        # The window that position and velocity limits leave.
        subtract(self.upper, position, allowed)
        subtract(position, self.lower, low)
        multiply(window, self._twice, window)
        sqrt(window, window)
        subtract(window, self._half, window)
        maximum(window, self._zero, out=window)
        minimum(window, self._ceiling, out=window)
        negative(low, low)
        minimum(wanted, allowed, out=allowed)
        maximum(allowed, low, out=allowed)
        # The acceleration limit has the last word; the window never needs more, save for a lowered velocity limit.
        add(stride, change, scratch)
        minimum(allowed, scratch, out=allowed)
        subtract(stride, change, scratch)
        maximum(allowed, scratch, out=scratch)
        not_equal(scratch, wanted, self._cut)
        # Swapping buffers keeps the last stride for the acceleration without a copy.
        self._last_stride, self._stride, self._scratch = stride, scratch, self._last_stride
        add(position, scratch, position)
        minimum(position, self.upper, out=position)
        maximum(position, self.lower, out=position)
        return count_nonzero(self._cut) > 0
