"""The controller's mind: chunks and joint states in, one safe command per tick out.

A pure function of what it is given and of the clock passed in: no time is read, no thread started, nothing random.
The same code runs in the real-time process and in the lockstep evaluation, and gives the same bits.

All stamps and `now_ns` are on ONE clock. Live that is the steady clock (the process boundary converts message stamps
by their age on arrival, so a jump of the ROS clock cannot move a running chunk); in lockstep it is the simulated one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vla_edge.control.capsules import CapsuleModel
from vla_edge.control.config import ControlConfig
from vla_edge.control.counters import Counters
from vla_edge.control.feed_forward import FeedForward
from vla_edge.control.grasp import Grasp
from vla_edge.control.gravity import Gravity
from vla_edge.control.limits import Limiter
from vla_edge.control.measurement import Measurement
from vla_edge.control.modes import MOVING, Event, Mode, after
from vla_edge.control.operator import Operator, OperatorError
from vla_edge.control.pace import Pace
from vla_edge.control.reflex import Reflex
from vla_edge.control.screening import RejectedChunk, Screening
from vla_edge.control.self_collision import SelfCollision
from vla_edge.control.spline import LEAST_STOP, ChunkSpline
from vla_edge.control.timeline import Timeline
from vla_edge.control.working_limits import WorkingLimits
from vla_edge.robots.robot import Robot
from vla_edge.types import NANOSECONDS, ActionChunk, JointCommand, JointState, VlaEdgeError

_LOOK_EVERY_S = 0.004
"""s between looks at the distances between parts of the robot: a hand at 2 m/s moves 8 mm meanwhile."""
_SOON_S, _POSTURES = 0.1, 4
"""s between the postures of a chunk that are looked at where the robot is close to itself, and how many."""
_HARDEST_STOP = 0.95
"""Fraction of the acceleration limits that a stop into FAULT or DAMP uses."""


class ControlError(VlaEdgeError):
    """The controller was asked for something it cannot do in its present state."""


class ControlKernel:
    """Modes, watchdogs, time line and limits behind one `tick`.

    Args:
        robot: joint table with working limits.
        joint_names: the J driven joints in command order; every chunk has to name exactly these, in any order.
        config: numbers.
        capsules: of these joints in this order, for distances between parts of the robot; None not to watch them.
        gravity: of these joints in this order, for the torque fed forward; None for none.

    Raises:
        RobotError: a name the robot does not have, limits that leave a joint no room, or gravity without torque limits.

    Attributes:
        limits: what no command leaves.
    """

    def __init__(
        self, robot: Robot, joint_names: Iterable[str], config: ControlConfig | None = None,
        capsules: CapsuleModel | None = None, gravity: Gravity | None = None,
    ):
        self.config = config = config or ControlConfig()
        self.robot = robot = robot.select(tuple(joint_names))
        self.joint_names = robot.joint_names
        joints = len(self.joint_names)
        self.limits = limits = WorkingLimits.of(robot, config)
        self._limiter = Limiter(
            limits.lower, limits.upper, limits.velocity, limits.acceleration, limits.jerk, config.period,
            config.catch_up_time, config.limit_repulsion,
        )
        self._deceleration = deceleration = config.stop_effort * limits.acceleration
        self._hardest = _HARDEST_STOP * limits.acceleration
        self._timeline = Timeline(
            joints, config.period_ns, deceleration, limits.velocity, limits.jerk, config.blend_time,
            config.blend_time_max,
        )
        self._self_collision = None
        if capsules is not None:
            self._self_collision = SelfCollision(
                capsules, config.collision_stop, config.collision_slow, deceleration, limits.jerk,
                max(1, round(_LOOK_EVERY_S * config.tick_rate)),
            )
        self._screening = Screening(self.joint_names, limits.lower, limits.upper, limits.velocity, config)
        self._measured = Measurement(
            self.joint_names, int(config.joint_state_timeout * NANOSECONDS), int(config.future_tolerance * NANOSECONDS)
        )
        self._reflex = Reflex(
            self.joint_names, config.tracking_error, robot.column("effort") * config.torque_band,
            int(config.reflex_time * NANOSECONDS),
        )
        self._grasp = Grasp(robot.column("grasp_torque"))
        self._command = np.zeros((3, joints))
        self._before, self._after = np.zeros(joints), np.zeros(joints)
        self._feed_forward = None if gravity is None else FeedForward(robot, gravity, config, limits.torque)
        self._grid_ns = 0
        self._newest_ns: int | None = None
        self._not_before_ns = 0
        self._ran_out_ns: int | None = None
        # Time the controller slept through its own ticks: a source is not stale for what nobody was there to hear.
        self._forgiven_ns, self._slept_until_ns = 0, 0
        self._pace = Pace(config)
        self._held = False
        self._stopped = False
        self.operator = Operator(self.joint_names, int(config.operator_timeout * NANOSECONDS), config.max_first_step)
        self.mode = Mode.INIT
        self.reason = "not armed yet"
        self.counters = Counters()

    # What the outside asks for -----------------------------------------------------------------------------------

    def rearm(self, state: JointState, now_ns: int) -> None:
        """Start, or leave FAULT or DAMP: HOLD at the measured position, then a start ramp.

        The command begins anew at the measured position, whatever it was; chunks that answer observations from before
        are refused.

        Raises:
            ControlError: emergency stop pressed, joint state old or unusable, or a joint far outside its limits.
        """
        if self._stopped:
            raise ControlError("emergency stop is pressed; release it, then re-arm")
        if self.mode not in MOVING:
            self._measured.freshness.forget()  # the source may have begun anew, on an earlier clock
        if not self.update_joints(state, now_ns):
            raise ControlError("the joint state to start from lacks joints or is not finite; check joint_states")
        freshness, measured = self._measured.freshness, self._measured.position
        if freshness.expired(now_ns):
            raise ControlError(
                f"the joint state to start from is {freshness.age_ns(now_ns) / 1e6:.0f} ms old, more than "
                f"joint_state_timeout {self.config.joint_state_timeout * 1e3:.0f} ms; check joint_states and clocks"
            )
        limiter = self._limiter
        outside = np.maximum(limiter.lower - measured, measured - limiter.upper)
        worst = int(np.argmax(outside))
        if outside[worst] > self.config.rearm_tolerance + self.config.position_margin:
            raise ControlError(
                f"joint {self.joint_names[worst]!r} stands at {measured[worst]:.3f} rad, "
                f"{outside[worst]:.3f} rad outside its limits; move the robot inside before re-arming"
            )
        limiter.restart(measured)
        self._grid_ns = now_ns
        self._timeline.stand(now_ns, limiter.position)
        self._before[:] = limiter.position
        self._ran_out_ns = None
        self._newest_ns = None
        self._not_before_ns = now_ns
        self._held = False
        self._reflex.forget()
        self._grasp.release()
        self._pace.restart(now_ns)
        self._enter(Event.REARM, "re-armed")

    def update_joints(self, state: JointState, now_ns: int) -> bool:
        """Take a measurement; refuse (and count) one that is not finite, lacks joints or comes from the future.

        A stamp of 0 counts as now. A measurement not newer than the last one does not count as fresh.
        """
        return self._heard(self._measured.update(state, now_ns))

    def measure(self, position: np.ndarray, torque: np.ndarray, stamp_ns: int, now_ns: int) -> bool:
        """`update_joints` for values already in command order, (J,) rad and N.m."""
        return self._heard(self._measured.take(position, torque, stamp_ns, now_ns))

    def _heard(self, fresh: bool | None) -> bool:
        if fresh is None:
            self.counters.bad_joint_states += 1
            return False
        # What was measured before a pause and comes after it is old by the pause: nobody was there to hear newer ones.
        if fresh and self._measured.freshness.fed_ns >= self._slept_until_ns:
            self._forgiven_ns = 0
        return True

    def accept_chunk(self, chunk: ActionChunk, now_ns: int) -> None:
        """Follow a chunk from the current grid time on, or refuse all of it.

        Raises:
            RejectedChunk: with its `reason`, counted; what is being followed stays.
        """
        try:
            positions = self._screening.check(chunk, now_ns, self._newest_ns, self._not_before_ns)
            if self.mode in (Mode.INIT, Mode.DAMP, Mode.FAULT):
                raise RejectedChunk("mode", f"the controller is in {self.mode.name}; re-arm it first")
            if self.mode is Mode.OPERATOR:
                raise RejectedChunk("operator", "an operator moves the robot")
            if self._held or self._pace.scale == 0.0:
                raise RejectedChunk("held", "a hold was requested or speed_scale is 0; resume first")
            if self._reflex.tripped:
                raise RejectedChunk("yield", "the robot is giving way to a contact; it goes on once it is free")
            spline = ChunkSpline(positions, chunk.dt, self.config.smoothing, self._deceleration, self.limits.jerk)
            entry = self._timeline.entry(spline, chunk.stamp_ns, self._grid_ns, self._pace.speed)
            command = self._state()
            self._screening.check_first_step(command[0], entry[0])
            begin = min(int((now_ns - chunk.stamp_ns) / NANOSECONDS / chunk.dt), len(positions) - 1)
            soon = positions[max(begin, 0) :: max(round(_SOON_S / chunk.dt), 1)][:_POSTURES]
            if self._self_collision is not None and self._self_collision.forbids(command[0], soon):
                raise RejectedChunk("collision", self._self_collision.reason())
        except RejectedChunk as error:
            self.counters.rejected[error.reason] += 1
            raise
        ramp = self._pace.ramp(self._grid_ns)
        self._timeline.follow(spline, chunk.stamp_ns, self._grid_ns, entry, command, ramp)
        self._before[:] = command[0]
        self._newest_ns = chunk.stamp_ns
        self._ran_out_ns = None
        self.counters.accepted += 1
        self._enter(Event.CHUNK, "following")

    def operate(self, target: np.ndarray, now_ns: int) -> None:
        """An operator's command, (J,) rad, NaN for joints to leave where they are; takes over from the policy.

        The robot moves there within its limits. The first one has to be close to the running command. Silence for
        `operator_timeout`, or `hand_back`, ends it.

        Raises:
            ControlError: not armed, held, or too far from the running command; counted.
        """
        try:
            if self.mode not in MOVING or self._held:
                raise OperatorError(f"the controller is {'held' if self._held else f'in {self.mode.name}'}; an operator "
                                    "can take over once it is re-armed or resumed")
            position = self._limiter.position
            self.operator.check(target, position, self.mode is not Mode.OPERATOR)
            aim = np.where(np.isnan(target), position, target)[None]
            collision = self._self_collision
            if collision is not None and (collision.speed == 0.0 or collision.forbids(position, aim)):
                raise OperatorError(collision.reason())
        except OperatorError as error:
            self.counters.operator_refused += 1
            raise ControlError(str(error)) from None
        if self.mode is not Mode.OPERATOR:
            self.counters.interventions += 1
            self.operator.begin(self._limiter.position, self._grid_ns)
            self._ran_out_ns = None
            self._enter(Event.TAKE_OVER, "an operator moves the robot")
        aim = self.operator.aim(target, self.limits.lower, self.limits.upper, now_ns)
        self._timeline.stand(self._grid_ns, aim)

    def hand_back(self, reason: str = "the operator handed back") -> None:
        """End an operator's turn: brake, then follow chunks that answer observations from now on."""
        if self.mode is Mode.OPERATOR:
            self._brake(Event.HAND_BACK, reason)

    def set_speed_scale(self, scale: float) -> None:
        """Speed along the chunk, 0 to 1, reached at `speed_scale_rate`; 0 ends in HOLD. Raises ControlError."""
        if not 0.0 <= scale <= 1.0:  # also refuses NaN
            raise ControlError(f"speed_scale is {scale!r}; it has to be a number from 0 to 1")
        self._pace.scale = float(scale)

    def hold(self) -> None:
        """Brake to rest and stay, refusing chunks, until `resume` or `rearm`."""
        self._held = True
        if self.mode in MOVING:
            self._brake(Event.HOLD, "hold requested")

    def resume(self) -> None:
        """Let fresh chunks end a requested hold."""
        self._held = False

    def damp(self) -> None:
        """Ask the sink for damping without stiffness, until `rearm`."""
        self._brake(Event.DAMP, "damping requested")

    def emergency_stop(self, on: bool) -> None:
        """Pressed: brake at once into FAULT (DAMP by configuration) and refuse re-arming; released: allow `rearm`."""
        self._stopped = bool(on)
        if on:
            self._brake(Event.DAMP if self.config.emergency_stop_damps else Event.FAULT, "emergency stop")

    def fault(self, reason: str) -> None:
        """Brake and freeze until `rearm`."""
        self._brake(Event.FAULT, reason)

    # The tick ----------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> JointCommand | None:
        """The command for `now_ns`; None before the first `rearm`, when there is nothing to say."""
        if not self.advance(now_ns):
            return None
        limiter = self._limiter
        return JointCommand(
            self._grid_ns, self.joint_names, limiter.position.copy(), limiter.velocity,
            self.effort_into(np.zeros(len(self.joint_names))),
        )

    def advance(self, now_ns: int) -> bool:
        """`tick` without making an object: `position` changes in place. False while INIT."""
        counters, config = self.counters, self.config
        counters.ticks += 1
        if self.mode is Mode.INIT:
            return False
        period = config.period_ns
        steps = (now_ns - self._grid_ns) // period
        if steps != 1:
            steps = self._irregular(steps, now_ns)
        if self._measured.freshness.expired(now_ns - self._forgiven_ns) and self.mode in MOVING:
            age = self._measured.freshness.age_ns(now_ns) or 0
            self._brake(Event.FAULT, f"joint state is {age / 1e6:.0f} ms old")
        if self.mode is Mode.OPERATOR and self.operator.presence.expired(now_ns - self._forgiven_ns):
            self.hand_back("the operator fell silent")
        tripped = self._reflex.watch(
            self._limiter.position, self._measured.position, self._measured.torque, now_ns
        )
        if tripped and self.mode in MOVING:
            self._give_way(tripped)
        if self._self_collision is not None:
            self._look_out(self._self_collision)
        for _ in range(steps):
            self._step()
        return True

    def _look_out(self, collision: SelfCollision) -> None:
        """Slow down, or brake into HOLD, where parts of the robot come close to each other."""
        if self.mode in MOVING and collision.due():
            self._pace.allowance = collision.look(self._state())
            if collision.speed > 0.0:
                return
            if self._timeline.following or self.mode is Mode.OPERATOR:
                self.counters.near_collisions += 1
                self._brake(Event.YIELD, collision.reason())

    def _give_way(self, reason: str) -> None:
        """Lead the command back to the measured position, which ends the push; then FAULT, or HOLD by configuration."""
        self.counters.reflexes += 1
        self._timeline.stand(self._grid_ns, self._measured.position)
        self._ran_out_ns = None
        self._enter(Event.YIELD if self.config.reflex_yields else Event.FAULT, reason)

    def _irregular(self, steps: int, now_ns: int) -> int:
        """How many grid steps to make for a tick that came early or late, and what becomes of the time between."""
        config, late = self.config, steps - 1
        if late < 0:
            return 0
        self._forgiven_ns += late * config.period_ns
        self._slept_until_ns = now_ns
        if late >= config.late_ticks:
            self.counters.late += 1
            self._pace.late(now_ns)
            if self.mode is Mode.FOLLOW:
                self._enter(Event.OVERLOAD, f"tick {late * config.period * 1e3:.0f} ms late")
        if late <= config.catch_up_ticks:
            return steps
        # Making it all up at once would be a step larger than one tick's: the time is lost along the chunk instead.
        self._grid_ns += late * config.period_ns
        self._timeline.lose(late)
        if late >= config.pause_ticks:
            # The robot has stood at the last command all the while: going on at speed would be a jerk.
            self.counters.gaps += 1
            self._limiter.halt()
            self._timeline.stand(self._grid_ns, self._limiter.position)
            self._before[:] = self._limiter.position
            self._ran_out_ns = None
            self._enter(Event.STARVE, f"the controller itself stood still for {late * config.period * 1e3:.0f} ms")
        return 1

    def _step(self) -> None:
        """One grid period: time along the chunk, ladder of degradation, reference, limits."""
        now, timeline, limiter = self._grid_ns + self.config.period_ns, self._timeline, self._limiter
        self.counters.steps += 1
        speed = self._pace_step(now)
        if timeline.following:
            timeline.advance(speed)
            self._degrade(now)
        else:
            # Standing is no progress: a chunk observed now will be entered at its beginning, however late it comes.
            timeline.advance(0.0)
        timeline.sample(now, self._after)
        if self._grasp.fingers:
            self._grasp.limit(self._after, limiter.position, self._measured.torque)
        if limiter.step(self._before, self._after):
            self.counters.limit_hits += 1
        self._before, self._after = self._after, self._before
        self._grid_ns = now

    def _pace_step(self, now_ns: int) -> float:
        """Speed along the chunk for this step; enters and leaves SLOWDOWN with it."""
        pace = self._pace
        was_cautious = pace.cautious
        speed = pace.step(now_ns)
        # Along a chunk speed scaling slows time; what an operator says has no time of its own.
        by_hand = speed if self.mode is Mode.OPERATOR else 1.0
        self._limiter.set_velocity_fraction(by_hand * pace.velocity_fraction(now_ns))
        if pace.cautious:
            if self.mode is Mode.FOLLOW:
                self._enter(Event.OVERLOAD, "ticks come late")
        elif was_cautious and self._ran_out_ns is None:
            self._enter(Event.RECOVER, "following")
        return speed

    def _degrade(self, now_ns: int) -> None:
        """Chunk running out: SLOWDOWN on its tail, then HOLD when nothing fresh has come."""
        if self._pace.speed == 0.0 and self._pace.scale == 0.0:
            self._brake(Event.HOLD, "speed_scale is 0")
        elif self._timeline.remaining(now_ns) <= 0.0:
            if self._ran_out_ns is None:
                self._ran_out_ns = now_ns
                self._enter(Event.RUN_OUT, "chunk ran out")
            elif now_ns - self._ran_out_ns >= self.config.hold_after * NANOSECONDS:
                self._brake(Event.STARVE, "nothing fresh")

    def _state(self) -> np.ndarray:
        """(3, J) running command. The limiter's velocity is that of the last step's middle: bring it to its end."""
        limiter = self._limiter
        self._command[0] = limiter.position
        self._command[2] = limiter.acceleration
        self._command[1] = limiter.velocity + (0.5 * limiter.period) * self._command[2]
        return self._command

    def _brake(self, event: Event, reason: str) -> None:
        """Change the mode and, when it changes or a chunk was being followed, plan a stop from where the command is."""
        was_following = self._timeline.following
        if after(self.mode, event) is self.mode and not was_following:
            return
        if self.mode is not Mode.INIT:
            if event in (Event.FAULT, Event.DAMP):
                self._timeline.stop(self._grid_ns, self._state(), self._hardest, 2 * self.config.period)
            else:
                self._timeline.stop(self._grid_ns, self._state(), self._deceleration, LEAST_STOP)
            self._before[:] = self._limiter.position
        self._ran_out_ns = None
        self._enter(event, reason)

    def _enter(self, event: Event, reason: str) -> None:
        mode = after(self.mode, event)
        if mode is self.mode:
            return
        if self.mode is Mode.OPERATOR:
            self.operator.end(self._grid_ns)
            self._not_before_ns = self._grid_ns
        self.counters.holds += mode is Mode.HOLD and event is not Event.REARM
        self.counters.faults += mode is Mode.FAULT
        self.mode, self.reason = mode, reason

    # What it shows -----------------------------------------------------------------------------------------------

    @property
    def position(self) -> np.ndarray:
        """(J,) rad, the running command; changes in place."""
        return self._limiter.position

    @property
    def velocity(self) -> np.ndarray:
        """(J,) rad/s of the running command, a new array."""
        return self._limiter.velocity

    def velocity_into(self, out: np.ndarray) -> np.ndarray:
        """`velocity` into an array of the caller, (J,) rad/s."""
        return self._limiter.velocity_into(out)

    def effort_into(self, out: np.ndarray) -> np.ndarray:
        """Torque fed forward with the running command into an array of the caller, (J,) N.m.

        It is led in with the start ramp and never exceeds the torque limits; without a gravity model it is zero.
        """
        if self._feed_forward is None:
            out[:] = 0.0
            return out
        return self._feed_forward.torque(self._limiter.position, self._pace.ramp(self._grid_ns), out)

    @property
    def grid_ns(self) -> int:
        """Time of the running command, ns."""
        return self._grid_ns

    @property
    def chunk_stamp_ns(self) -> int | None:
        """Stamp of the newest chunk accepted since re-arming, ns."""
        return self._newest_ns

    @property
    def holding(self) -> int:
        """How many fingers hold something."""
        return self._grasp.holding

    @property
    def nearest(self) -> float:
        """m between the two closest parts of the robot that are watched; inf without capsules."""
        return np.inf if self._self_collision is None else self._self_collision.nearest

    @property
    def speed(self) -> float:
        """Speed along the chunk now, 0 to 1."""
        return self._pace.speed
