"""The last word on every command: limits in position, velocity, acceleration and jerk that hold for any input.

The command advances on a fixed grid of period h by a' = a + j h, v' = v + a' h, q' = q + v' h, so what an observer
computes by finite differences is exactly what is limited. Every command given out has a stop of its own
(`stopping.plan_stop`) that lies inside the limits. The next command is the one that follows the reference best among
some that have such a stop too; where none has, it is the next step of the stop at hand. So no command leaves the
limits, by induction, whatever the reference does.

Most joints in most ticks are decided by a bound instead of a plan: where the limits are further away than any stop
from the present speed could reach, none is needed yet.
"""

from __future__ import annotations

from math import copysign, sqrt

import numpy as np
from numpy import absolute, add, count_nonzero, divide, greater, maximum, minimum, multiply, not_equal, subtract

from vla_edge.control.stopping import Stop, jerk_of, plan_stop, reach_of_stops

# The finite differences of float64 positions of a few rad carry rounding, the third ones most; staying this far inside
# makes "not one command outside" hold to the last bit and not to a tolerance.
_INSIDE, _JERK_INSIDE = 1.0 - 1e-6, 1.0 - 1e-5
_ROOM = 1e-9
"""rad kept from the position limits, for the rounding of stops of thousands of steps."""
_SHARES = (1.0, 0.5, 0.25, 0.0625)
"""Shares of the way from the stop at hand to what is wanted, tried in this order."""
_LANDING = 0.25
"""Distance from the reference, in units of the jerk limit, from which one step puts the command on it for good: the
velocity that this takes has to be undone by twice the jerk in the next step."""


class Limiter:
    """Follows a reference as closely as the limits of J joints allow.

    Args:
        lower, upper: (J,) rad.
        velocity: (J,) rad/s.
        acceleration: (J,) rad/s^2.
        jerk: (J,) rad/s^3.
        period: s of the grid.
        catch_up_time: s, time constant of the return to the reference close to it.
        repulsion: s; towards a position limit a joint moves no faster than the distance to it in this time; 0 for none.

    Attributes:
        position: (J,) rad, the command; changes in place.
    """

    def __init__(
        self, lower, upper, velocity, acceleration, jerk, period: float, catch_up_time: float, repulsion: float = 0.0
    ):
        self.lower, self.upper = np.array(lower, float), np.array(upper, float)
        self.velocity_limit, self.acceleration_limit = np.array(velocity, float), np.array(acceleration, float)
        self.jerk_limit = np.array(jerk, float)
        self._lower, self._upper = self.lower + _ROOM, self.upper - _ROOM
        joints = len(self.lower)
        self.period = period
        self.position = np.zeros(joints)
        # Everything below is per step of the grid: rad for velocities, accelerations and jerks.
        self._top = self.velocity_limit * _INSIDE * period
        most, jerk = self.acceleration_limit * _INSIDE * period**2, self.jerk_limit * _JERK_INSIDE * period**3
        self._joints = [
            # Braking curves are for accelerations that change in much less time than the way back takes.
            _Joint(
                float(m), float(j), float(low), float(high), period / max(catch_up_time, period, 2.0 * m / j * period),
                min(period / repulsion, 1.0) if repulsion else 1.0,
            )
            for m, j, low, high in zip(most, jerk, self._lower, self._upper)
        ]
        reach, least, self._gain = np.array([reach_of_stops(*row) for row in zip(self._top, most, jerk)]).T.copy()
        self._reach, self._far = maximum(reach, repulsion / period), 0.5 * (self.upper - self.lower) - least
        self._middle = 0.5 * (self.lower + self.upper)
        self._velocity, self._acceleration = np.zeros(joints), np.zeros(joints)
        # Jerk, acceleration, distance to the reference, velocity and place of the next command, against what needs no
        # plan and no thought.
        self._next, self._simple = np.zeros((5, joints)), np.zeros((5, joints))
        self._simple[:3] = jerk, most, _LANDING * jerk
        self._rows = tuple(self._next)
        self._exceeds, self._any = np.zeros((5, joints), bool), np.zeros(joints, bool)
        self._target, self._exact, self._wanted, self._scratch = (np.zeros(joints) for _ in range(4))
        self._differs = np.zeros(joints, bool)
        self._tick = 0
        self._fraction = float("nan")
        self.set_velocity_fraction(1.0)

    @property
    def velocity(self) -> np.ndarray:
        """(J,) rad/s, a new array."""
        return self._velocity / self.period

    @property
    def acceleration(self) -> np.ndarray:
        """(J,) rad/s^2, a new array."""
        return self._acceleration / self.period**2

    def velocity_into(self, out: np.ndarray) -> np.ndarray:
        """`velocity` into an array of the caller, (J,) rad/s."""
        return divide(self._velocity, self.period, out)

    def restart(self, position: np.ndarray) -> None:
        """Begin at rest at `position` (J,) rad, brought inside the limits."""
        np.clip(position, self._lower, self._upper, out=self.position)
        self.halt()

    def halt(self) -> None:
        """Take the velocity as zero: the robot stood at the last command while nobody computed the next."""
        self._velocity[:] = self._acceleration[:] = 0.0
        self._tick += 2  # no stop at hand is of use any more

    def set_velocity_fraction(self, fraction: float) -> None:
        """Scale the velocity limits, 0 to 1; a joint above the new limit brakes within its other limits."""
        if fraction == self._fraction:
            return
        self._fraction = fraction
        for joint, top in zip(self._joints, self._top):
            joint.top = float(top) * fraction
        subtract(fraction * self._top, self._gain, self._simple[3])

    def step(self, before: np.ndarray, after: np.ndarray) -> bool:
        """Advance one period towards a reference that moves from `before` to `after` (both (J,) rad, finite).

        Returns whether a limit changed the command.
        """
        target, exact, scratch, position = self._target, self._exact, self._scratch, self.position
        following, simple, wanted = self._next, self._simple, self._wanted
        jerk, acceleration, distance, velocity, place = self._rows
        maximum(after, self._lower, out=target)
        minimum(target, self._upper, out=target)
        # The acceleration that puts the command on the reference in one step, and what would come of it.
        subtract(target, position, velocity)
        subtract(velocity, self._velocity, exact)
        subtract(exact, self._acceleration, jerk)
        acceleration[:] = wanted[:] = exact
        subtract(before, position, distance)
        subtract(target, self._middle, place)
        absolute(following, following)
        multiply(velocity, self._reach, scratch)
        subtract(self._far, scratch, simple[4])
        greater(following, simple, self._exceeds)
        self._tick += 1
        if count_nonzero(self._exceeds):
            self._exceeds.any(axis=0, out=self._any)
            for index in np.flatnonzero(self._any).tolist():
                wanted[index] = self._joints[index].choose(
                    self._tick, float(before[index]), float(target[index]), float(position[index]),
                    float(self._velocity[index]), float(self._acceleration[index]), float(exact[index]),
                )
        self._acceleration[:] = wanted
        add(self._velocity, wanted, self._velocity)
        add(position, self._velocity, position)
        minimum(position, self.upper, out=position)
        maximum(position, self.lower, out=position)
        not_equal(wanted, exact, self._differs)
        changed = count_nonzero(self._differs)
        subtract(target, after, scratch)
        absolute(scratch, scratch)
        greater(scratch, 2.0 * _ROOM, self._differs)
        return changed + count_nonzero(self._differs) > 0


class _Joint:
    """One joint that may have to stop, or is not where its reference is.

    Args:
        most, jerk: limits, rad per step^2 and per step^3.
        lower, upper: rad.
        pull: 1 / steps of the time constant of the way back to the reference.
        repulsion: largest share of the distance to a position limit that is covered in one step.
    """

    __slots__ = (
        "top", "_most", "_jerk", "_lower", "_upper", "_pull", "_inner_pull", "_repulsion", "_stop",
        "_step", "_tick", "_speed",
    )

    def __init__(self, most: float, jerk: float, lower: float, upper: float, pull: float, repulsion: float):
        self.top = 0.0
        self._most, self._jerk, self._lower, self._upper = most, jerk, lower, upper
        self._pull, self._inner_pull, self._repulsion = pull, min(4.0 * pull, 1.0), repulsion
        self._stop: Stop | None = None
        self._step, self._tick, self._speed = 0, -2, 0.0

    def choose(
        self, tick: int, before: float, target: float, position: float, velocity: float, acceleration: float,
        exact: float,
    ) -> float:
        """The next acceleration, of a command whose reference moves from `before` to `target` inside the limits.

        Args:
            tick: counts steps; a stop planned in the one before is still at hand.
            exact: the acceleration that would put the command on the reference.
        """
        most, jerk = self._most, self._jerk
        continued = tick == self._tick + 1
        if not continued:
            self._stop, self._step = plan_stop(velocity, acceleration, most, jerk), 0
        self._tick = tick
        before = min(max(before, self._lower), self._upper)
        slowest = max(-self.top, self._repulsion * (self._lower - position))
        fastest = min(self.top, self._repulsion * (self._upper - position))
        if not (
            abs(exact - acceleration) <= jerk and abs(exact) <= most and abs(before - position) <= _LANDING * jerk
            and slowest <= velocity + exact <= fastest
        ):
            exact = self._back(before, target, position, velocity, continued, slowest, fastest)
        self._speed = target - before
        wanted = min(max(exact, acceleration - jerk, -most), acceleration + jerk, most)
        change = jerk_of(self._stop, self._step)
        # At the end of the stop: rest, without what rounding has left.
        planned = -velocity if change is None else acceleration + change
        for share in _SHARES:
            tried = wanted if share == 1.0 else planned + share * (wanted - planned)
            speed = velocity + tried
            stop = plan_stop(speed, tried, most, jerk)
            if self._inside(position + speed, speed, stop):
                self._stop, self._step = stop, 0
                return tried
        self._step += 1
        return planned

    def _inside(self, position: float, speed: float, stop: Stop) -> bool:
        return (
            abs(speed) <= self.top and stop.fastest <= self.top
            and position + stop.lowest >= self._lower and position + stop.highest <= self._upper
        )

    def _back(
        self, before: float, target: float, position: float, velocity: float, continued: bool, slowest: float,
        fastest: float,
    ) -> float:
        """The acceleration on the way back to a reference that the limits have cut, at `slowest` to `fastest`.

        A cascade: velocity from the distance, acceleration from the velocity, each proportional close to its goal and
        along a braking curve further off, with the reference's own velocity and acceleration fed forward. Half of the
        limits for the curves leaves the other half for changing onto them.
        """
        speed = target - before
        bend = min(max(speed - self._speed, -self._most), self._most) if continued else 0.0
        speed += _undo(before - position, self._pull, 0.5 * self._most)
        speed = min(max(speed, slowest), fastest)
        return bend + _undo(speed - bend - velocity, self._inner_pull, 0.5 * self._jerk)


def _undo(error: float, pull: float, limit: float) -> float:
    """Rate at which to undo an error: pull |e| close by, a curve braked by `limit` further off, equal slopes between."""
    size, knee = abs(error), limit / (pull * pull)
    if size <= knee:
        return pull * error
    return copysign(sqrt(2.0 * limit * (size - 0.5 * knee)), error)
