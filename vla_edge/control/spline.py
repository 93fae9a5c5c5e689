"""Smooth curves through a chunk's points: twice continuously differentiable, cheap at every tick.

A chunk becomes a natural cubic spline (interpolating, or Reinsch's smoothing spline), continued after its last point
by a planned stop. For a fixed number of points the spline is a constant matrix times the points, so accepting a chunk
is two small products and evaluating one is a dot product.

Reinsch, "Smoothing by spline functions", Numerische Mathematik 10 (1967).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


LEAST_STOP = 0.1
"""s, shortest planned stop: from a small velocity a shorter one would be a jerk."""


@lru_cache(maxsize=32)
def spline_matrices(points: int, smoothing: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Matrices that turn points into knot values and knot second derivatives, for unit knot distance.

    Args:
        points: number of points T >= 2.
        smoothing: Reinsch's weight of curvature against misfit; 0 interpolates. Straight lines always stay as they are.

    Returns:
        (values (T, T), curvatures (T, T)): knot values = values @ p and second derivatives = curvatures @ p.
    """
    if points < 2:
        raise ValueError(f"a spline needs at least two points, got {points}")
    inner = points - 2
    values, curvatures = np.eye(points), np.zeros((points, points))
    if inner:
        second = np.zeros((points, inner))  # Q: second differences
        roughness = np.zeros((inner, inner))  # R: products of the hat functions
        for i in range(inner):
            second[i : i + 3, i] = 1.0, -2.0, 1.0
            roughness[i, i] = 2.0 / 3.0
            if i + 1 < inner:
                roughness[i, i + 1] = roughness[i + 1, i] = 1.0 / 6.0
        solved = np.linalg.solve(roughness + smoothing * second.T @ second, second.T)
        curvatures[1:-1] = solved
        if smoothing:
            values -= smoothing * second @ solved
    values.setflags(write=False)
    curvatures.setflags(write=False)
    return values, curvatures


class ChunkSpline:
    """A chunk as a curve over seconds since its stamp: line before the first point, stop after the last.

    Args:
        positions: (T, J) rad; row i at time (i + 1) * dt.
        dt: s between rows.
        smoothing: see `spline_matrices`.
        deceleration: (J,) rad/s^2 the stop after the last point may use.
        jerk: (J,) rad/s^3, likewise.
    """

    def __init__(
        self, positions: np.ndarray, dt: float, smoothing: float, deceleration: np.ndarray, jerk: np.ndarray
    ):
        points, joints = positions.shape
        values, curvatures = spline_matrices(points, smoothing)
        knots = values @ positions if smoothing else positions
        bend = curvatures @ positions
        self.dt = dt
        self.points = points
        # Power form per interval over u in [0, 1), then the stop over u in [0, 1] as a quartic.
        pieces = np.zeros((points, 5, joints))
        pieces[:-1, 0] = knots[:-1]
        pieces[:-1, 1] = knots[1:] - knots[:-1] - (2.0 * bend[:-1] + bend[1:]) / 6.0
        pieces[:-1, 2] = 0.5 * bend[:-1]
        pieces[:-1, 3] = (bend[1:] - bend[:-1]) / 6.0
        end_velocity = (knots[-1] - knots[-2] + (bend[-2] + 2.0 * bend[-1]) / 6.0) / dt
        at_rest = np.zeros(joints)
        self.tail = stop_time(end_velocity, at_rest, deceleration, jerk, max(LEAST_STOP, dt))
        stop_coefficients(knots[-1], end_velocity, at_rest, self.tail, pieces[-1])
        self._pieces = pieces
        self._row = np.zeros(5)
        self._basis = np.zeros((3, 5))

    @property
    def end(self) -> float:
        """s since the stamp of the last point."""
        return self.points * self.dt

    def _locate(self, seconds: float) -> tuple[int, float, float]:
        """Interval, position in it and its length in s."""
        u = seconds / self.dt - 1.0
        last = self.points - 1
        if u < last:
            index = max(int(u), 0) if u > 0.0 else 0
            return index, u - index, self.dt
        return last, min((seconds - self.end) / self.tail, 1.0), self.tail

    def position(self, seconds: float, out: np.ndarray) -> np.ndarray:
        """Position at `seconds` since the stamp, rad, into `out` (J,)."""
        index, u, _ = self._locate(seconds)
        row = self._row
        row[0], row[1] = 1.0, u
        if u < 0.0:
            row[2] = row[3] = row[4] = 0.0
        else:
            square = u * u
            row[2], row[3], row[4] = square, square * u, square * square
        return np.dot(row, self._pieces[index], out=out)

    def state(self, seconds: float) -> np.ndarray:
        """(3, J): position rad, velocity rad/s and acceleration rad/s^2 at `seconds` since the stamp."""
        index, u, length = self._locate(seconds)
        basis = self._basis
        basis[:] = 0.0
        basis[0, :2] = 1.0, u
        basis[1, 1] = 1.0
        if u >= 0.0:
            basis[0, 2:] = u**2, u**3, u**4
            basis[1, 2:] = 2 * u, 3 * u**2, 4 * u**3
            basis[2, 2:] = 2.0, 6 * u, 12 * u**2
        state = basis @ self._pieces[index]
        state[1] /= length
        state[2] /= length * length
        return state


def stop_time(
    velocity: np.ndarray, acceleration: np.ndarray, deceleration: np.ndarray, jerk: np.ndarray, least: float
) -> float:
    """s in which all joints come to rest together from `velocity` and `acceleration`, not under `least`.

    Within `deceleration` and `jerk` (all (J,)), those of `stop_coefficients`: 1.5 v / T, and 6 v / T^2 + 4 a / T.
    """
    speed, bend = np.abs(velocity), np.abs(acceleration)
    for_jerk = (2.0 * bend + np.sqrt(4.0 * bend * bend + 6.0 * jerk * speed)) / jerk
    return max(float(np.max(1.5 * speed / deceleration)), float(np.max(for_jerk)), least)


def stop_coefficients(
    position: np.ndarray, velocity: np.ndarray, acceleration: np.ndarray, duration: float, out: np.ndarray
) -> np.ndarray:
    """Quartic from a moving state (each (J,)) to rest over u in [0, 1], its velocity a cubic Hermite; (5, J) in `out`.

    With no acceleration at the start the largest deceleration is 1.5 |velocity| / duration.
    """
    travel, bend = duration * velocity, duration * duration * acceleration
    out[0] = position
    out[1] = travel
    out[2] = bend / 2.0
    out[3] = -travel - bend * (2.0 / 3.0)
    out[4] = travel / 2.0 + bend / 4.0
    return out


def fade_coefficients(offset: np.ndarray, duration: float, out: np.ndarray) -> np.ndarray:
    """Quintic that takes an offset (3, J: rad, rad/s, rad/s^2) to zero with zero slope and curvature; (6, J) in `out`.

    Over u in [0, 1] of `duration` s: continuity of position, velocity and acceleration at both ends.
    """
    p, v, a = offset[0], offset[1] * duration, offset[2] * (duration * duration)
    out[0] = p
    out[1] = v
    out[2] = a / 2.0
    out[3] = -10.0 * p - 6.0 * v - 1.5 * a
    out[4] = 15.0 * p + 8.0 * v + 1.5 * a
    out[5] = -6.0 * p - 3.0 * v - a / 2.0
    return out
