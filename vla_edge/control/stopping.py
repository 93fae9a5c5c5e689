"""Stops within acceleration and jerk limits, on the grid the command lives on.

The command advances by v' = v + a', q' = q + v' (per step of the grid), and a jerk is the change of a from one step to
the next. A stop is four phases of constant jerk with whole numbers of steps, so that it ends at rest exactly and its
finite differences are what is limited, not an approximation of them:

    a -> 0,  0 -> p,  p held,  p -> 0             where braking has not begun
             a -> p,  p held,  p -> 0             where it has

With the steps chosen by the continuous optimum (a trapezoid in acceleration) and rounded up, p follows from the
condition that the velocity ends at zero. Every state has such a stop; it lasts at most a few steps longer than the
shortest. How far it goes is a polynomial in the numbers of steps: no simulation.

Plain functions of floats: the few joints that need a stop in a tick take microseconds each.
"""

from __future__ import annotations

from math import ceil, sqrt
from typing import NamedTuple

# Rounding of products of a few numbers; what is limited keeps a margin a thousand times as large.
_SLACK = 1.0 + 1e-9


class Stop(NamedTuple):
    """One joint's way to rest, per step of the grid.

    Attributes:
        ends: steps after which each of the four phases is over, cumulative.
        jerks: of each phase, rad per step^3.
        lowest, highest: rad, bounds of the way relative to the state, the state included.
        fastest: rad per step, the largest speed on the way beside the present one.
    """

    ends: tuple[int, int, int, int]
    jerks: tuple[float, float, float, float]
    lowest: float
    highest: float
    fastest: float


def plan_stop(velocity: float, acceleration: float, most: float, jerk: float) -> Stop:
    """The stop from `velocity`, reached by `acceleration`, within `most` acceleration and `jerk`.

    All per step of the grid: rad, rad per step^2, rad per step^3; `acceleration` does not exceed `most`.
    """
    release = ceil(abs(acceleration) / jerk)
    # Velocity left once the acceleration has been let go; its sign is the direction of the stop.
    left = velocity + 0.5 * acceleration * (release - 1)
    sign = -1.0 if left < 0.0 else 1.0
    speed, bend, left = velocity * sign, acceleration * sign, left * sign
    if bend <= 0.0 <= speed:
        direct = _direct_stop(speed, -bend, left, sign, most, jerk)
        if direct is not None:
            return direct
    # A trapezoid of n steps up, m held and n down sheds p (n + m) over (n + m / 2 - 1) times the velocity.
    ramp = max(ceil(min(sqrt(left / jerk), most / jerk)), 1)
    held = max(ceil(left / most) - ramp, 0)
    peak = left / (ramp + held)
    slope = sign * peak / ramp
    begin, held_from = release + ramp, release + ramp + held
    ahead = release * speed + bend * (release * release - 1) / 3.0 + left * (ramp + 0.5 * held - 1.0)
    return Stop(
        (release, begin, held_from, held_from + ramp),
        (-acceleration / release if release else 0.0, -slope, 0.0, slope),
        *_bounds(sign, ahead, release * max(-speed, 0.0)),
        left,
    )


def _direct_stop(speed: float, brake: float, left: float, sign: float, most: float, jerk: float) -> Stop | None:
    """The stop from `speed` where `brake` (both not negative) slows it down already; None where that is too late.

    It is too late close to the end, where rounding up would let go of the brake faster than the jerk allows.
    """
    shed = speed + 0.5 * brake  # a ramp from b to zero in n steps sheds b n / 2 of it
    peak = min(sqrt(jerk * shed + 0.5 * brake * brake), most)
    rise_time, fall_time = (peak - brake) / jerk, peak / jerk
    held_time = (shed - 0.5 * brake * rise_time) / peak - 0.5 * (rise_time + fall_time) if peak else 0.0
    rise, held, fall = max(ceil(rise_time), 1), max(ceil(held_time), 0), max(ceil(fall_time), 1)
    peak = (shed - 0.5 * brake * rise) / (0.5 * (rise + fall) + held)
    up, down = (peak - brake) / rise, peak / fall
    if not (abs(up) <= jerk * _SLACK and 0.0 <= down <= jerk * _SLACK and peak <= most):
        return None
    ahead = (
        rise * speed - 0.5 * brake * rise * (rise + 1) - (peak - brake) * (rise + 1) * (rise + 2) / 6.0
        + 0.5 * peak * held * (fall + held - 2) + peak * (fall - 1) * (fall - 2) / 6.0
    )
    return Stop(
        (0, rise, rise + held, rise + held + fall), (0.0, -sign * up, 0.0, sign * down), *_bounds(sign, ahead, 0.0), left
    )


def _bounds(sign: float, ahead: float, behind: float) -> tuple[float, float]:
    """(lowest, highest) of a way that ends `ahead` in direction `sign` and first goes back by up to `behind`."""
    back, forth = min(-behind, ahead), max(0.0, ahead)
    return (back, forth) if sign > 0.0 else (-forth, -back)


def jerk_of(stop: Stop, step: int) -> float | None:
    """Jerk of step 0, 1, ... of a stop; None once it is over."""
    for end, jerk in zip(stop.ends, stop.jerks):
        if step < end:
            return jerk
    return None


def reach_of_stops(velocity: float, most: float, jerk: float) -> tuple[float, float, float]:
    """(r, s, w): no stop from up to `velocity` goes further than r |v| + s or becomes faster than |v| + w.

    Whatever the acceleration: what a joint far from its limits need not be asked. Units as in `plan_stop`.
    """
    release = most / jerk + 1.0
    gain = 0.5 * most * release
    ramp = 0.5 * (gain + velocity) / most + 0.5 * most / jerk + 2.5
    return release + ramp + 0.5 * gain / most, most * release * release / 3.0 + gain * ramp + 2.0 * gain, gain
