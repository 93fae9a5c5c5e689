"""The controller's own process: wake, read the mailboxes, tick the kernel, give the command to the sink, sleep.

Started by `ControllerProcess` as `python -m vla_edge.control.worker`; nothing else runs in it, so no executor, import
or garbage collection can make a tick late.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import time

import numpy as np

from vla_edge.control.exchange import COUNTERS, ORDERS_KEPT, Order, State, WorkerPlan, layout
from vla_edge.control.kernel import ControlError
from vla_edge.control.lateness import LatenessHistogram
from vla_edge.control.loop import DeadlineLoop
from vla_edge.control.mailbox import SharedBlock
from vla_edge.control.modes import MOVING
from vla_edge.control.realtime import other_threads, prioritize, request_realtime
from vla_edge.control.screening import RejectedChunk
from vla_edge.types import NANOSECONDS, ActionChunk, JointCommand, JointState, VlaEdgeError

REPORT_EVERY_S = 0.05
ORPHAN_AFTER_S = 2.0
"""A controller whose parent is gone has been in FAULT for want of joint states; it ends after this long."""


class Worker:
    """One controller between its mailboxes and its sink.

    Args:
        plan: what to run.
        block: mailboxes of `layout(J)`.
        sink: takes (JointCommand, Mode) at `command_rate`, None for none; its `listened()`, where it has one, tells
            whether anyone takes its commands.
    """

    def __init__(self, plan: WorkerPlan, block: SharedBlock, sink):
        self.kernel = plan.kernel()
        self.loop = DeadlineLoop(plan.config.period_ns, self.tick)
        self._config, self._sink = plan.config, sink
        self._listened = getattr(sink, "listened", lambda: True)
        self._joints, self._chunk, self._orders = block["joints"], block["chunk"], block["orders"]
        self._operator = block["operator"]
        self._command, self._report = block["command"], block["report"]
        self._work = LatenessHistogram()
        self._late_counts = np.frombuffer(self.loop.lateness.counts, np.int64)
        self._work_counts = np.frombuffer(self._work.counts, np.int64)
        self._countdown = 0
        self._report_every = max(1, round(REPORT_EVERY_S * plan.config.tick_rate))
        self._report_countdown = 1
        self._offset = 0
        self._done = 0
        self._sink_errors = 0
        self._rejection = self._refusal = b""
        self._grant = None
        self._parent = os.getppid()
        self._orphaned_ns: int | None = None

    def run(self, grant) -> None:
        """Tick until told to stop."""
        self._grant = grant
        self._report.fields["began"][...] = time.monotonic_ns()
        self.loop.run()
        self._write_report(time.monotonic_ns(), running=False)

    def tick(self, deadline_ns: int) -> None:
        began = time.monotonic_ns()
        kernel = self.kernel
        if self._joints.fetch():
            fields = self._joints.fields
            self._offset = int(fields["offset"])
            kernel.measure(fields["position"], fields["effort"], int(fields["stamp"]), deadline_ns)
        if self._orders.fetch():
            self._carry_out(deadline_ns)
        if self._operator.fetch():
            self._operate(deadline_ns)
        if self._chunk.fetch():
            self._take_chunk(deadline_ns)
        armed = kernel.advance(deadline_ns)
        if self._countdown == 0:
            self._countdown = self._config.command_every
            if armed:
                self._give_command()
        self._countdown -= 1
        self._report_countdown -= 1
        if self._report_countdown <= 0:
            self._report_countdown = self._report_every
            self._write_report(deadline_ns)
            self._look_for_parent(deadline_ns)
        self._work.add(time.monotonic_ns() - began)

    def _give_command(self) -> None:
        kernel, fields = self.kernel, self._command.fields
        fields["stamp"][...] = kernel.grid_ns
        fields["offset"][...] = self._offset
        fields["mode"][...] = kernel.mode
        fields["position"][:] = kernel.position
        kernel.velocity_into(fields["velocity"])
        kernel.effort_into(fields["effort"])
        self._command.post()
        if self._sink is not None:
            values = (fields["position"], fields["velocity"], fields["effort"])
            command = JointCommand(kernel.grid_ns + self._offset, kernel.joint_names, *values)
            try:
                self._sink(command, kernel.mode)
            except Exception as error:  # a sink that fails must not take the controller with it
                self._sink_errors += 1
                if self._sink_errors == 1:
                    print(f"controller sink failed: {error}", file=sys.stderr, flush=True)

    def _take_chunk(self, now_ns: int) -> None:
        fields = self._chunk.fields
        points = int(fields["points"])
        try:
            self.kernel.accept_chunk(
                ActionChunk(
                    int(fields["stamp"]), self.kernel.joint_names, fields["positions"][:points], float(fields["dt"])
                ),
                now_ns,
            )
        except RejectedChunk as error:
            self._rejection = str(error).encode()

    def _operate(self, now_ns: int) -> None:
        try:
            self.kernel.operate(self._operator.fields["position"], now_ns)
        except ControlError as error:
            self._rejection = str(error).encode()

    def _carry_out(self, now_ns: int) -> None:
        fields, kernel = self._orders.fields, self.kernel
        count = int(fields["count"])
        for number in range(max(self._done, count - ORDERS_KEPT), count):
            kind, value = Order(int(fields["kind"][number % ORDERS_KEPT])), float(fields["value"][number % ORDERS_KEPT])
            try:
                self._refusal = b""
                if kind is Order.SPEED_SCALE:
                    kernel.set_speed_scale(value)
                elif kind is Order.HOLD:
                    kernel.hold()
                elif kind is Order.RESUME:
                    kernel.resume()
                elif kind is Order.DAMP:
                    kernel.damp()
                elif kind is Order.EMERGENCY_STOP:
                    kernel.emergency_stop(value > 0.0)
                elif kind is Order.REARM:
                    self._rearm(now_ns)
                elif kind is Order.HAND_BACK:
                    kernel.hand_back()
                elif kind is Order.STOP:
                    self.loop.stop()
            except ControlError as error:
                self._refusal = str(error).encode()
        self._done = count
        self._write_report(now_ns)

    def _rearm(self, now_ns: int) -> None:
        fields = self._joints.fields
        if not int(fields["stamp"]):
            raise ControlError("no joint state has arrived yet; check joint_states")
        state = JointState(int(fields["stamp"]), self.kernel.joint_names, fields["position"])
        self.kernel.rearm(state, now_ns)

    def _look_for_parent(self, now_ns: int) -> None:
        if os.getppid() == self._parent:
            return
        if self._orphaned_ns is None:
            self._orphaned_ns = now_ns
            self.kernel.fault("the process that feeds the controller is gone")
        elif now_ns - self._orphaned_ns > ORPHAN_AFTER_S * NANOSECONDS:
            self.loop.stop()

    def _write_report(self, now_ns: int, running: bool = True) -> None:
        kernel, fields = self.kernel, self._report.fields
        fields["stamp"][...] = now_ns
        fields["state"][...] = State.RUNNING if running else State.ENDED
        fields["mode"][...] = kernel.mode
        if kernel.mode not in MOVING:  # the middleware takes a lock to tell, which no tick of a moving robot waits for
            fields["listened"][...] = self._listened()
        fields["speed"][...] = kernel.speed
        fields["chunk_stamp"][...] = kernel.chunk_stamp_ns or 0
        fields["taken_over"][...] = kernel.operator.began_ns
        fields["handed_back"][...] = kernel.operator.ended_ns
        fields["offset"][...] = self._offset
        fields["orders_done"][...] = self._done
        fields["overruns"][...] = self.loop.overruns
        fields["sink_errors"][...] = self._sink_errors
        for place, name in enumerate(COUNTERS):
            fields["counters"][place] = getattr(kernel.counters, name)
        for place, count in enumerate(kernel.counters.rejected.values()):
            fields["rejected"][place] = count
        fields["late_maximum"][...] = self.loop.lateness.maximum_ns
        fields["work_maximum"][...] = self._work.maximum_ns
        fields["reason"][...] = kernel.reason.encode()
        fields["rejection"][...] = self._rejection
        fields["refusal"][...] = self._refusal
        if self._grant is not None:
            grant = self._grant
            fields["granted"][:] = grant.scheduler, grant.affinity, grant.memory, grant.awake
            fields["recipe"][...], fields["note"][...] = grant.recipe.encode(), grant.note.encode()
        fields["lateness"][:] = self._late_counts
        fields["work"][:] = self._work_counts
        self._report.post()


def rehearse(plan: WorkerPlan) -> None:
    """Run a second kernel through its paces, so that the first real tick finds code and pages warm."""
    kernel = plan.kernel()
    middle = (kernel.limits.lower + kernel.limits.upper) / 2
    still = np.zeros_like(middle)
    now, period = NANOSECONDS, plan.config.period_ns
    kernel.rearm(JointState(now, kernel.joint_names, middle), now)
    for number in range(200):
        now += period
        kernel.measure(middle, still, now, now)
        if number % 50 == 0:
            for points in (32, 50):
                chunk = ActionChunk(now + points - 100, kernel.joint_names, np.tile(middle, (points, 1)), 0.05)
                kernel.accept_chunk(chunk, now)
        kernel.tick(now)


def main() -> int:
    """Entry of the process; the plan comes pickled on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    plan: WorkerPlan = pickle.load(sys.stdin.buffer)
    block = SharedBlock(layout(len(plan.joint_names)), plan.descriptor)
    sink = None
    try:
        sink = plan.sink(*plan.sink_arguments) if plan.sink is not None else None
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a sink's client library may have installed its own
        # The middleware's threads hold locks that a command on its way out waits for, and must not be kept from a
        # processor by ordinary load.
        prioritize(plan.realtime.priority - 1, other_threads())
        worker = Worker(plan, block, sink)
        signal.signal(signal.SIGTERM, lambda *_: worker.loop.stop())
        rehearse(plan)
        gc.collect()
        gc.freeze()
        gc.disable()
        worker.run(request_realtime(plan.realtime))
    except Exception as error:
        report = block["report"]
        report.fields["state"][...] = State.FAILED
        report.fields["reason"][...] = f"{type(error).__name__}: {error}".encode()
        report.post()
        if not isinstance(error, VlaEdgeError):
            raise
        return 1
    finally:
        if hasattr(sink, "close"):
            sink.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
