"""The real-time controller as an object: a process of its own, fed through shared memory.

Why a process: a busy Python thread beside the loop makes every tick wait for the interpreter lock (p50 7 ms late was
measured), an executor in another process does not. How a node uses it:

    controller = ControllerProcess(robot, joint_names, config, sink=make_publisher, sink_arguments=(...))
    controller.start()                       # on configure; raises ControlProcessError
    controller.send_joints(state)            # in the joint_states callback, any rate
    controller.send_chunk(chunk)             # in the action_chunk callback
    controller.rearm()                       # ~/rearm, raises ControlError with the sentence to answer
    controller.report()                      # in a slow timer, for ~/status and /diagnostics
    controller.stop()                        # on shutdown

`make_publisher` is a module-level function run INSIDE the controller's process before real-time priority is asked
for. It makes its own publisher (an rclpy node that publishes needs no spinning) and returns `sink(command, mode)`,
called at `command_rate`; it may carry a `close()`, and a `listened()` that tells whether anyone takes the commands: a
robot that does not hear them is not armed, since it would jump to wherever they are when it does. The command's arrays are reused after the call. With no sink, read
`command()` instead.

Stamps given here are on the message clock (ROS time). They are converted on arrival by their age, so the loop lives on
the steady clock and a jump of the message clock moves nothing that is already running.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from vla_edge.clocks import offset_ns
from vla_edge.control.config import ControlConfig
from vla_edge.control.exchange import ORDERS_KEPT, Order, State, WorkerPlan, layout, text
from vla_edge.control.kernel import ControlError, ControlKernel
from vla_edge.control.mailbox import SharedBlock
from vla_edge.control.realtime import RealtimeRequest
from vla_edge.control.report import ControlReport, read_report
from vla_edge.control.screening import MAX_POINTS, REJECTIONS, RejectedChunk
from vla_edge.robots.robot import Robot
from vla_edge.types import ActionChunk, JointCommand, JointState, VlaEdgeError

NOBODY_LISTENS = "nobody listens to the commands; start the robot's driver or its simulation, and check remappings"


class ControlProcessError(VlaEdgeError):
    """The controller's process did not start, or is gone."""


class ControllerProcess:
    """A ControlKernel on a real-time loop in a process of its own.

    Args:
        robot, joint_names, config: as for ControlKernel.
        sink, sink_arguments: module-level function and its arguments, see the module's text; both are pickled.
        realtime: priority, processor and memory locking to ask for.
        clock: message clock, ns.
        joint_stamps: believe the stamps of joint states; otherwise they count as measured when sent.
        capsules, gravity: paths of models for distances between the robot's parts and for gravity; empty for none.
        keep_open: file descriptors the process holds open for as long as it lives, such as locks.

    Raises:
        RobotError: as ControlKernel does.
    """

    def __init__(
        self,
        robot: Robot,
        joint_names: Iterable[str],
        config: ControlConfig | None = None,
        sink: Callable | None = None,
        sink_arguments: tuple = (),
        realtime: RealtimeRequest | None = None,
        clock: Callable[[], int] = time.time_ns,
        joint_stamps: bool = True,
        keep_open: tuple[int, ...] = (),
        capsules: str = "",
        gravity: str = "",
    ):
        self.config = config or ControlConfig()
        self.joint_names = ControlKernel(robot, joint_names, self.config).joint_names
        self._block = SharedBlock(layout(len(self.joint_names)))
        self._plan = WorkerPlan(
            robot, self.joint_names, self.config, realtime or RealtimeRequest(), sink, tuple(sink_arguments),
            self._block.descriptor, capsules, gravity,
        )
        self._clock, self._joint_stamps, self._keep_open = clock, joint_stamps, keep_open
        self._child: subprocess.Popen | None = None
        self._orders, self._ordering = 0, threading.Lock()
        self._order: np.ndarray = np.arange(len(self.joint_names))
        self._order_of: tuple[str, ...] = self.joint_names
        self._refused = dict.fromkeys(REJECTIONS, 0)
        self._refused_joints = 0
        self._rejection = ""

    def start(self, timeout: float = 30.0) -> None:
        """Start the process and wait for its first tick. Raises ControlProcessError."""
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # Products of a few dozen numbers: threads would only add wake-ups.
        for library in ("OMP", "OPENBLAS", "MKL"):
            environment[f"{library}_NUM_THREADS"] = "1"
        self._child = subprocess.Popen(
            [sys.executable, "-m", "vla_edge.control.worker"],
            stdin=subprocess.PIPE, pass_fds=(self._block.descriptor, *self._keep_open), env=environment,
        )
        try:
            pickle.dump(self._plan, self._child.stdin)
            self._child.stdin.close()
        except BrokenPipeError:
            pass
        fields, deadline = self._block["report"].fields, time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._block["report"].fetch()
            if fields["state"] == State.RUNNING:
                return
            if self._child.poll() is not None or fields["state"] == State.FAILED:
                break
            time.sleep(0.005)
        reason = text(fields["reason"]) or f"nothing heard within {timeout:g} s, exit code {self._child.poll()}"
        self._kill()
        raise ControlProcessError(f"the controller's process did not start: {reason}")

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child is not None and self._child.poll() is None

    def send_joints(self, state: JointState) -> bool:
        """Hand over a measurement; False (and counted) when it lacks joints. Cheap: no call into the controller."""
        if state.names != self._order_of:
            index = {name: i for i, name in enumerate(state.names)}
            order = [index.get(name, -1) for name in self.joint_names]
            if min(order) < 0:
                self._refused_joints += 1
                return False
            self._order, self._order_of = np.array(order), state.names
        offset = offset_ns(self._clock)
        box = self._block["joints"]
        box.fields["offset"][...] = offset
        believed = state.stamp_ns and self._joint_stamps
        box.fields["stamp"][...] = state.stamp_ns - offset if believed else time.monotonic_ns()
        np.take(state.position, self._order, out=box.fields["position"])
        np.take(state.effort, self._order, out=box.fields["effort"])
        box.post()
        return True

    def send_chunk(self, chunk: ActionChunk) -> None:
        """Hand over a chunk. Raises RejectedChunk (counted) for joints or length; the rest is judged by the
        controller at its next tick and counted in `report()`."""
        names = self.joint_names
        points = len(chunk.positions)
        if chunk.joint_names != names and (
            len(chunk.joint_names) != len(names) or set(chunk.joint_names) != set(names)
        ):
            odd = ", ".join(sorted(set(chunk.joint_names) ^ set(names))) or "number"
            self._refuse("joints", f"joints differ from the controller's in {odd}")
        if points > MAX_POINTS:
            self._refuse("shape", f"{points} points; at most {MAX_POINTS} are taken")
        positions = chunk.positions
        if chunk.joint_names != names:
            positions = positions[:, [chunk.joint_names.index(name) for name in names]]
        box = self._block["chunk"]
        box.fields["stamp"][...] = chunk.stamp_ns - offset_ns(self._clock)
        box.fields["dt"][...] = chunk.dt
        box.fields["points"][...] = points
        box.fields["positions"][:points] = positions
        box.post(24 + 8 * points * len(names))

    def send_operator(self, names: tuple[str, ...], position: np.ndarray) -> None:
        """Hand over an operator's command: (len(names),) rad for some or all driven joints; none at all hands back.

        Raises:
            ControlError: a joint that is not driven, or a value that is not finite.
        """
        if not names:
            self._send(Order.HAND_BACK)
            return
        unknown = [name for name in names if name not in self.joint_names]
        if unknown or len(position) != len(names):
            what = f"joint {unknown[0]!r}, which is not driven" if unknown else f"{len(position)} positions"
            raise ControlError(f"the operator's command for {len(names)} joints has {what}")
        if not np.isfinite(position).all():
            raise ControlError("the operator's command is not finite")
        box = self._block["operator"]
        box.fields["stamp"][...] = time.monotonic_ns()
        box.fields["position"][:] = np.nan
        box.fields["position"][[self.joint_names.index(name) for name in names]] = position
        box.post()

    def set_speed_scale(self, scale: float) -> None:
        """See ControlKernel. Raises ControlError."""
        if not 0.0 <= scale <= 1.0:
            raise ControlError(f"speed_scale is {scale!r}; it has to be a number from 0 to 1")
        self._send(Order.SPEED_SCALE, scale)

    def hold(self) -> None:
        self._send(Order.HOLD)

    def resume(self) -> None:
        self._send(Order.RESUME)

    def damp(self) -> None:
        self._send(Order.DAMP)

    def emergency_stop(self, on: bool) -> None:
        self._send(Order.EMERGENCY_STOP, float(bool(on)))

    @property
    def listened(self) -> bool:
        """Whether anyone takes the commands; arming is refused as long as not."""
        report = self._block["report"]
        report.fetch()
        return bool(report.fields["listened"])

    def rearm(self, timeout: float = 1.0) -> None:
        """Arm at the last joint state sent. Raises ControlError when refused, ControlProcessError without an answer."""
        report, deadline = self._block["report"], time.monotonic() + timeout
        while not self.listened:
            if time.monotonic() > deadline:
                raise ControlError(NOBODY_LISTENS)
            time.sleep(0.005)
        number, deadline = self._send(Order.REARM), time.monotonic() + timeout
        while time.monotonic() < deadline:
            report.fetch()
            if report.fields["orders_done"] >= number:
                refusal = text(report.fields["refusal"])
                if refusal:
                    raise ControlError(refusal)
                return
            time.sleep(0.0005)
        raise ControlProcessError(f"the controller did not answer within {timeout:g} s; is it alive: {self.alive}")

    def command(self) -> JointCommand | None:
        """The newest command, stamped on the message clock; None before the first."""
        box = self._block["command"]
        box.fetch()
        fields = box.fields
        if not int(fields["stamp"]):
            return None
        arrays = (fields[name].copy() for name in ("position", "velocity", "effort"))
        return JointCommand(int(fields["stamp"]) + int(fields["offset"]), self.joint_names, *arrays)

    def report(self) -> ControlReport:
        """What the controller last said about itself, with what was refused on this side."""
        box = self._block["report"]
        box.fetch()
        return read_report(box.fields, self._refused, self._refused_joints, self._rejection)

    def stop(self, timeout: float = 3.0) -> None:
        """End the process after its present tick; idempotent."""
        if self._child is None:
            return
        if self.alive:
            self._send(Order.STOP)
            try:
                self._child.wait(timeout)
            except subprocess.TimeoutExpired:
                pass
        self._kill()
        self._block["report"].fetch()

    def __enter__(self) -> ControllerProcess:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _send(self, order: Order, value: float = 0.0) -> int:
        box = self._block["orders"]
        with self._ordering:  # of two threads' orders at once neither may be lost: one may be an emergency stop
            slot = self._orders % ORDERS_KEPT
            box.fields["kind"][slot] = order
            box.fields["value"][slot] = value
            self._orders += 1
            box.fields["count"][...] = self._orders
            box.post()
            return self._orders

    def _refuse(self, reason: str, sentence: str) -> None:
        self._refused[reason] += 1
        error = RejectedChunk(reason, sentence)
        self._rejection = str(error)
        raise error

    def _kill(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(1.0)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
