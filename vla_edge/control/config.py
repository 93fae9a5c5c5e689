"""Every number of the controller, with its unit, range and reason.

`ControlConfig.parameters()` lists them for a node to declare; the same table validates them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from vla_edge.types import NANOSECONDS, VlaEdgeError


class ControlConfigError(VlaEdgeError):
    """A controller parameter is outside its range or contradicts another."""


@dataclass(frozen=True)
class Parameter:
    """One row of the parameter table: `low` and `high` are both allowed."""

    name: str
    default: float | int | bool
    low: float
    high: float
    unit: str
    description: str


def _number(default: float | int, low: float, high: float, unit: str, description: str):
    return field(default=default, metadata={"low": low, "high": high, "unit": unit, "description": description})


@dataclass(frozen=True)
class ControlConfig:
    """Controller parameters; times in s, angles in rad. Raises ControlConfigError when one is out of range."""

    tick_rate: int = _number(1000, 100, 2000, "Hz", "how often the command is computed")
    command_rate: int = _number(500, 10, 2000, "Hz", "how often it is published; has to divide tick_rate")
    position_margin: float = _number(0.02, 0.0, 0.5, "rad", "distance kept from the joints' position limits")
    velocity_scale: float = _number(1.0, 0.01, 1.0, "", "fraction of the robot's working velocities used")
    acceleration_scale: float = _number(1.0, 0.01, 1.0, "", "fraction of the robot's working accelerations used")
    jerk_scale: float = _number(1.0, 0.01, 1.0, "", "fraction of the robot's working jerks used")
    catch_up_time: float = _number(0.02, 0.002, 0.5, "s", "time constant to rejoin a reference the limits cut")
    limit_repulsion: float = _number(
        0.05, 0.0, 1.0, "s", "towards a position limit, joints move no faster than the distance to it in this time"
    )
    # 0.3 keeps 95 % of a 2 Hz motion in a 20 Hz chunk and 6 % of noise that alternates from point to point.
    smoothing: float = _number(0.3, 0.0, 10.0, "", "smoothing of the chunk's spline; 0 passes through every point")
    blend_time: float = _number(0.15, 0.02, 2.0, "s", "shortest fade from the running command into a new chunk")
    blend_time_max: float = _number(0.6, 0.02, 5.0, "s", "longest such fade, for a chunk that starts far away")
    stop_effort: float = _number(0.7, 0.1, 0.95, "", "fraction of the acceleration limit a planned stop uses")
    hold_after: float = _number(0.1, 0.0, 5.0, "s", "from the chunk's last point to HOLD, unless a fresh one comes")
    joint_state_timeout: float = _number(0.05, 0.005, 5.0, "s", "age of the joint state that means FAULT")
    operator_timeout: float = _number(0.3, 0.02, 5.0, "s", "silence of the operator that hands back to the policy")
    late_ticks: int = _number(3, 1, 100, "periods", "lateness of a tick that means SLOWDOWN")
    overload_speed: float = _number(0.5, 0.05, 1.0, "", "speed along the chunk while ticks come late")
    overload_recovery: float = _number(0.25, 0.05, 60.0, "s", "time without a late tick before full speed returns")
    catch_up_ticks: int = _number(2, 0, 100, "periods", "lateness made up by several steps at once; more is lost time")
    pause_ticks: int = _number(20, 3, 1000, "periods", "lateness after which it goes on from rest, in HOLD")
    max_chunk_age: float = _number(1.0, 0.05, 10.0, "s", "oldest observation a chunk may answer on arrival")
    future_tolerance: float = _number(0.05, 0.0, 1.0, "s", "how far in the future a stamp may lie (clocks differ)")
    position_tolerance: float = _number(0.1, 0.0, 1.0, "rad", "excess over the limits that is clipped; more rejects")
    chunk_velocity_ratio: float = _number(2.0, 1.0, 100.0, "", "largest chunk velocity over the working limit")
    max_first_step: float = _number(0.5, 0.01, 7.0, "rad", "largest distance from the command to a new chunk")
    # A G1's arm motors, with their default stiffness, are at their largest torque at 0.4 rad.
    tracking_error: float = _number(0.5, 0.0, 7.0, "rad", "distance of a joint from its command that trips; 0: never")
    torque_band: float = _number(1.0, 0.0, 10.0, "", "measured torque that trips, over the joint's limit; 0: never")
    reflex_time: float = _number(0.1, 0.0, 5.0, "s", "time outside its band that trips the reflex")
    reflex_yields: bool = _number(False, 0, 1, "", "a tripped reflex gives way and goes on by itself, not into FAULT")
    collision_stop: float = _number(0.01, 0.0, 0.5, "m", "distance between parts of the robot at which it stands")
    collision_slow: float = _number(0.05, 0.0, 1.0, "m", "distance between parts of the robot from which it slows down")
    gravity_scale: float = _number(1.0, 0.0, 1.0, "", "fraction of the gravity model's torque that is fed forward")
    torque_scale: float = _number(1.0, 0.0, 1.0, "", "fraction of the joints' torque limits that may be fed forward")
    start_ramp: float = _number(2.0, 0.0, 30.0, "s", "from re-arming to full speed")
    speed_scale_rate: float = _number(2.0, 0.1, 100.0, "1/s", "fastest change of the speed along the chunk")
    rearm_tolerance: float = _number(0.1, 0.0, 1.0, "rad", "how far outside its limits a joint may be re-armed")
    emergency_stop_damps: bool = _number(False, 0, 1, "", "emergency stop asks the sink for DAMP, not a held FAULT")

    def __post_init__(self):
        for row in self.parameters():
            value = getattr(self, row.name)
            kind = type(row.default)
            good = isinstance(value, bool) == (kind is bool) and isinstance(value, (int, float))
            good = good and math.isfinite(value) and row.low <= value <= row.high
            if not good or (kind is int and value != int(value)):
                wanted = "true or false" if kind is bool else f"a {'whole ' * (kind is int)}number in "
                wanted += "" if kind is bool else f"[{row.low:g}, {row.high:g}] {row.unit}".rstrip()
                raise ControlConfigError(f"controller parameter {row.name} is {value!r}; it has to be {wanted}")
            object.__setattr__(self, row.name, kind(value))
        if self.tick_rate % self.command_rate:
            raise ControlConfigError(
                f"controller parameter command_rate is {self.command_rate} Hz, which does not divide "
                f"tick_rate {self.tick_rate} Hz; choose a divisor"
            )
        if NANOSECONDS % self.tick_rate:
            raise ControlConfigError(
                f"controller parameter tick_rate is {self.tick_rate} Hz, whose period is not a whole number of "
                "nanoseconds; choose a rate that divides 1e9, such as 500, 1000 or 2000"
            )
        if self.collision_slow < self.collision_stop:
            raise ControlConfigError(
                f"controller parameter collision_slow is {self.collision_slow} m, below collision_stop "
                f"{self.collision_stop} m"
            )
        if self.blend_time_max < self.blend_time:
            raise ControlConfigError(
                f"controller parameter blend_time_max is {self.blend_time_max} s, below blend_time {self.blend_time} s"
            )

    @classmethod
    def parameters(cls) -> Iterator[Parameter]:
        """The parameter table, in order."""
        for item in fields(cls):
            meta = item.metadata
            yield Parameter(item.name, item.default, meta["low"], meta["high"], meta["unit"], meta["description"])

    @property
    def period_ns(self) -> int:
        return NANOSECONDS // self.tick_rate

    @property
    def period(self) -> float:
        """s."""
        return 1.0 / self.tick_rate

    @property
    def command_every(self) -> int:
        """Ticks per published command."""
        return self.tick_rate // self.command_rate
