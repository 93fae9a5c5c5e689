"""Conducts the demonstration: one episode for each seed through the live nodes, then the evaluation of its recording.

Everything it does a user could do with `ros2 service call` and `ros2 topic pub`; it measures what arrives in its own
process. It ends with code 0 when enough episodes succeeded, chunks came fast enough, and no step failed.
"""

from __future__ import annotations

import math
import time

import numpy as np
from rclpy.node import Node
from std_msgs.msg import Int64, String
from trajectory_msgs.msg import JointTrajectory

from vla_edge.nodes import convert, qos
from vla_edge.nodes.client import ConductError, Conductor
from vla_edge.nodes.demo_monitor import Monitor
from vla_edge.nodes.demo_report import write_report
from vla_edge.nodes.params import Parameter, Parameters
from vla_edge.nodes.run import run_once
from vla_edge.sim.world import HOME
from vla_edge.types import ActionChunk

PARAMETERS = (
    Parameter("seeds", list(range(9001, 9013)), "one episode each", 0, 2**62),
    Parameter("output", "out/demo", "directory of report, bag and film"),
    Parameter("bundle", "", "engine the vla node serves, for its facts and the evaluation"),
    Parameter("checkpoint", "", "full precision to compare with in the evaluation; empty for none"),
    Parameter("bag", "", "recording to evaluate afterwards; empty when nothing is recorded"),
    Parameter("home", HOME.tolist(), "joint positions returned to between episodes, in the order of joint_states (rad)"),
    Parameter("home_time", 1.6, "s for the way there", 0.5, 10.0),
    Parameter("start_timeout", 120.0, "s for the nodes to become active", 1.0, 600.0),
    Parameter("linger", 0.4, "s the policy goes on after an outcome", 0.0, 10.0),
    Parameter("min_success", 0.8, "share of episodes that have to succeed", 0.0, 1.0),
    Parameter("min_chunk_rate", 5.0, "chunks per second that have to arrive", 0.0, 100.0),
)
ARM_WITHIN = 10.0  # s


class Demo:
    """The sequence. `problems` collects the steps that failed, in words."""

    def __init__(self, node: Node, values, conductor: Conductor):
        self._log, self._values, self._conductor = node.get_logger(), values, conductor
        self._reset = node.create_publisher(Int64, "sim/reset", qos.COMMAND)
        self._instruction = node.create_publisher(String, "instruction", qos.LATCHED)
        self._chunk = node.create_publisher(JointTrajectory, "action_chunk", qos.chunk(1.0, 2.0 * values.home_time))
        self.monitor = Monitor(node)
        self.rows: list[dict] = []
        self.problems: list[str] = []

    def run(self) -> None:
        """All episodes, whatever happens in one of them."""
        for name in ("controller", "vla"):
            self._conductor.wait_active(name, self._values.start_timeout)
        if not Conductor.wait(self.monitor.joints, 30.0):
            raise ConductError("no joint state arrives; is the robot, or its simulation, running?")
        if not Conductor.wait(lambda: self.monitor.pictures() > 0, 60.0):
            raise ConductError("no picture reaches the VLA node; is the camera running?")
        for number, seed in enumerate(self._values.seeds):
            try:
                row = self._episode(int(seed), first=number == 0)
            except ConductError as error:
                self.problems.append(f"episode of seed {seed}: {error}")
                self._log.error(self.problems[-1])
                continue
            self.rows.append(row)
            done = "done" if row["success"] else "wrong object first" if row["wrong_first"] else "not done"
            self._log.info(
                f"{number + 1}/{len(self._values.seeds)}  \"{row['instruction']}\": {done} in {row['seconds']:.1f} s"
            )

    def _episode(self, seed: int, first: bool) -> dict:
        call, monitor = self._conductor.call, self.monitor
        if not first:
            self._go_home()
        self._reset.publish(Int64(data=seed))
        begin_ns = time.time_ns()
        if not Conductor.wait(lambda: monitor.episode.get("seed") == seed, 5.0):
            raise ConductError("the simulation did not reset")
        self._rearm()
        call("vla/start")
        monitor.begin()
        outcome = Conductor.wait(
            lambda: monitor.outcome if monitor.outcome.get("seed") == seed else None,
            monitor.episode["time_limit_s"] + 5.0,
        )
        if outcome is None:
            raise ConductError("the simulation gave no outcome")
        time.sleep(self._values.linger)
        monitor.end()
        call("vla/stop")
        # An empty instruction withdraws the last one: nothing that follows is the policy's doing.
        self._instruction.publish(String(data=""))
        return {**outcome, "begin_ns": begin_ns, "end_ns": time.time_ns()}

    def _rearm(self) -> None:
        """Arms, also where the controller has not found everything yet: on a busy computer discovery takes seconds."""
        give_up = time.monotonic() + ARM_WITHIN
        while True:
            try:
                self._conductor.call("controller/rearm")
                return
            except ConductError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.2)

    def _go_home(self) -> None:
        """A chunk back to where episodes begin, through the controller like any other."""
        joints, home = self.monitor.joints(), np.array(self._values.home)
        now = np.array(joints.position)
        if home.shape != now.shape:
            raise ConductError(f"parameter home has {home.size} positions, the robot {now.size} joints")
        dt = 0.05
        share = np.arange(1, round(self._values.home_time / dt) + 1)[:, None] * dt / self._values.home_time
        way = now + (home - now) * (1 - np.cos(math.pi * share)) / 2
        self._chunk.publish(convert.to_trajectory(ActionChunk(time.time_ns(), tuple(joints.name), way, dt)))
        time.sleep(self._values.home_time + 0.3)


def demo(node: Node) -> int:
    """Runs the demonstration and writes its report."""
    values = Parameters(node, PARAMETERS).read()
    with Conductor(node) as conductor:
        run = Demo(node, values, conductor)
        try:
            run.run()
            Conductor.wait(lambda: False, 1.2)  # the last diagnostics
        except ConductError as error:
            run.problems.append(str(error))
            node.get_logger().error(str(error))
        if values.bag:
            try:
                node.get_logger().info(conductor.call("recorder/stop", 30.0))
            except ConductError as error:
                run.problems.append(f"recording: {error}")
    return write_report(node, values, run.monitor, run.rows, run.problems)


def main(args=None) -> None:
    """Runs the node."""
    run_once("demo", demo, args)
