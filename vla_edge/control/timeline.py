"""The reference on an absolute time line: the newest chunk from now on, joined to the running command without a jump.

A chunk is placed by its observation's stamp. Where it and the running command differ (they always do: the world and
the network's noise have moved on), the difference in position, velocity and acceleration at the moment of the switch
fades out as a quintic, so the reference is continuous up to acceleration across chunks.

Speed scaling slows the time along the chunk, and standing stops it. The time line keeps how far it lags behind the
clock, also for the past, so that a chunk answering an older observation is entered where the robot really is along
it: at its age when it has been moving since the observation, at its beginning when it has been standing.
"""

from __future__ import annotations

import numpy as np

from vla_edge.control.spline import ChunkSpline, fade_coefficients, stop_coefficients, stop_time

_SECONDS = 1e-9
_HISTORY = 8192  # grid steps of lag remembered: 8 s at 1 kHz, 4 s at 2 kHz


class Timeline:
    """Reference positions of J joints over time: nothing but standing still, a planned stop, or a chunk.

    Args:
        joints: J.
        period_ns: grid of the ticks, ns.
        deceleration: (J,) rad/s^2 that fades keep to, about half of it.
        velocity: (J,) rad/s, likewise.
        jerk: (J,) rad/s^3, likewise; stops use all of it.
        blend_time, blend_time_max: s, shortest and longest fade into a chunk.
    """

    def __init__(
        self, joints: int, period_ns: int, deceleration: np.ndarray, velocity: np.ndarray, jerk: np.ndarray,
        blend_time: float, blend_time_max: float,
    ):
        self._period_ns = period_ns
        self._deceleration, self._velocity = np.array(deceleration, float), np.array(velocity, float)
        self._jerk = np.array(jerk, float)
        self._blend_time, self._blend_time_max = blend_time, blend_time_max
        self._spline: ChunkSpline | None = None
        self._stamp_ns = 0
        self._stamp_lag = 0.0
        self._start_ns = 0
        self._duration = 1.0
        self._fading = False
        self._stop = np.zeros((5, joints))
        self._fade = np.zeros((6, joints))
        self._row5, self._row6 = np.ones(5), np.ones(6)
        self._offset = np.zeros(joints)
        self._lag = 0.0
        self._lags = np.zeros(_HISTORY)
        self._index = 0

    @property
    def following(self) -> bool:
        """Whether a chunk is being followed, its tail included."""
        return self._spline is not None

    @property
    def stamp_ns(self) -> int:
        """Stamp of the chunk followed, ns."""
        return self._stamp_ns

    @property
    def lag(self) -> float:
        """s that the time along chunks has lost to the clock through standing and speed scaling."""
        return self._lag

    def advance(self, speed: float) -> None:
        """One period of the clock at `speed` (0 to 1) along the chunk."""
        if speed != 1.0:
            self._lag += (1.0 - speed) * self._period_ns * _SECONDS
        self._index = (self._index + 1) % _HISTORY
        self._lags[self._index] = self._lag

    def lose(self, periods: int) -> None:
        """Periods of the clock that nobody ticked: they pass without progress along the chunk."""
        for _ in range(min(periods, _HISTORY)):
            self.advance(0.0)

    def _lag_at(self, age_ns: int) -> float:
        steps = min(max(age_ns // self._period_ns, 0), _HISTORY - 1)
        return float(self._lags[(self._index - steps) % _HISTORY])

    def seconds(self, now_ns: int) -> float:
        """s along the followed chunk, from its observation."""
        return (now_ns - self._stamp_ns) * _SECONDS - (self._lag - self._stamp_lag)

    def remaining(self, now_ns: int) -> float:
        """s before a chunk's last point is reached or its time is over, whichever is first; -inf without a chunk.

        Its time also runs while speed scaling keeps the robot from getting on: a plan does not become fresh by that.
        """
        if self._spline is None:
            return -np.inf
        return self._spline.end - max(self.seconds(now_ns), (now_ns - self._stamp_ns) * _SECONDS)

    def entry(self, spline: ChunkSpline, stamp_ns: int, now_ns: int, speed: float) -> np.ndarray:
        """(3, J) position, velocity, acceleration of a chunk where it would be entered now at `speed` along it."""
        seconds = (now_ns - stamp_ns) * _SECONDS - (self._lag - self._lag_at(now_ns - stamp_ns))
        state = spline.state(seconds)
        state[1] *= speed
        state[2] *= speed * speed
        return state

    def follow(
        self, spline: ChunkSpline, stamp_ns: int, now_ns: int, entry: np.ndarray, command: np.ndarray, ramp: float = 1.0
    ) -> None:
        """Replace everything from `now_ns` on by a chunk.

        Args:
            entry: from `entry()`.
            command: (3, J) running command: rad, rad/s, rad/s^2.
            ramp: fraction of the velocity limit the fade may use, as while starting up.
        """
        offset = command - entry
        distance, speed = np.abs(offset[0]), np.abs(offset[1])
        # Peaks of the quintic: 1.875 d/T in velocity, 5.77 d/T^2 and 4 v/T in acceleration, 60 d/T^3 in jerk.
        duration = max(
            float(np.max(1.875 * distance / (max(ramp, 0.05) * 0.5 * self._velocity))),
            float(np.sqrt(np.max(5.77 * distance / (0.5 * self._deceleration)))),
            float(np.max(4.0 * speed / self._deceleration)),
            float(np.cbrt(np.max(60.0 * distance / (0.5 * self._jerk)))),
        )
        self._duration = min(max(duration, self._blend_time), self._blend_time_max)
        fade_coefficients(offset, self._duration, self._fade)
        self._spline, self._stamp_ns, self._stamp_lag = spline, stamp_ns, self._lag_at(now_ns - stamp_ns)
        self._start_ns, self._fading = now_ns, True

    def stop(self, now_ns: int, command: np.ndarray, deceleration: np.ndarray, least: float) -> float:
        """Replace everything from `now_ns` on by a planned stop from `command` (3, J) within `deceleration` (J,).

        Returns its duration, s, which is not under `least`.
        """
        self._duration = stop_time(command[1], command[2], deceleration, self._jerk, least)
        stop_coefficients(command[0], command[1], command[2], self._duration, self._stop)
        self._spline, self._start_ns = None, now_ns
        return self._duration

    def stand(self, now_ns: int, position: np.ndarray) -> None:
        """Replace everything by standing at `position` (J,) rad."""
        self._stop[:] = 0.0
        self._stop[0] = position
        self._spline, self._start_ns, self._duration = None, now_ns, 0.02

    def sample(self, now_ns: int, out: np.ndarray) -> np.ndarray:
        """Reference position at `now_ns`, rad, into `out` (J,)."""
        u = (now_ns - self._start_ns) * _SECONDS / self._duration
        if self._spline is None:
            u = min(max(u, 0.0), 1.0)
            row = self._row5
            square = u * u
            row[1], row[2], row[3], row[4] = u, square, square * u, square * square
            return np.dot(row, self._stop, out=out)
        self._spline.position(self.seconds(now_ns), out)
        if self._fading:
            if u >= 1.0:
                self._fading = False
            else:
                row = self._row6
                square = u * u
                cube = square * u
                row[1], row[2], row[3], row[4], row[5] = u, square, cube, square * square, square * cube
                np.dot(row, self._fade, out=self._offset)
                out += self._offset
        return out
