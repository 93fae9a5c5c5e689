"""Action chunks in, safe joint commands out: feeds the real-time controller and says how it is.

The loop itself runs in a process of its own (control/process.py), which also publishes joint_command; this node only
hands over what arrives and asks for reports, so nothing that happens here can make a tick late.
"""

from __future__ import annotations

import os
import time

from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

from vla_edge.control.config import ControlConfig
from vla_edge.control.process import ControllerProcess
from vla_edge.control.realtime import RealtimeRequest, prioritize
from vla_edge.nodes.command_publisher import CommandPublisher
from vla_edge.nodes.control_inputs import ControlInputs
from vla_edge.nodes.controller_status import status_level, status_values
from vla_edge.nodes.exclusive import claim, refuse_second
from vla_edge.nodes.health import Health
from vla_edge.nodes.interventions import Interventions
from vla_edge.nodes.params import Parameter, Parameters
from vla_edge.nodes.run import run_node
from vla_edge.nodes.sinks import SINKS, SinkSetup
from vla_edge.resources import share_directory
from vla_edge.robots.dex3 import SIDES
from vla_edge.robots.robot import Robot, load_robot
from vla_edge.robots.unitree_frame import FrameOptions
from vla_edge.types import VlaEdgeError

CONTROL = tuple(
    Parameter(row.name, row.default, f"{row.description}{f' ({row.unit})' if row.unit else ''}",
              *(() if isinstance(row.default, bool) else (row.low, row.high)))
    for row in ControlConfig.parameters()
)
PARAMETERS = (
    Parameter("robot", "g1", "'g1', 'g1:<mode>', either with '+dex3' for hands, a YAML or URDF file, or URDF text"),
    Parameter("robot_description", "", "URDF, its text or its file, whose limits the robot's may not exceed"),
    Parameter("joints", [""], "joints to drive, in command order; empty takes the robot's own list"),
    Parameter("sink", "joint_state", "message that joint_command carries", choices=tuple(SINKS)),
    Parameter("collision_model", "", "capsules that keep the robot's parts apart: 'auto' for those of a known robot, or "
              "a YAML file; empty for none"),
    Parameter("gravity_model", "", "MJCF or URDF file whose gravity torque is fed forward; empty for none"),
    Parameter("unitree_weight_ramp", 1.0, "s in which arm_sdk's weight is led in, and out at the end", 0.1, 5.0),
    Parameter("unitree_mode_pr", 0, "0: ankles and waist in pitch and roll; 1: by their parallel motors", 0, 1),
    Parameter("unitree_waist", False, "command the driven waist joints through arm_sdk too; may upset balance"),
    Parameter("rearm_on_activate", False, "arm without waiting for ~/rearm, at the first joint state after "
              "somebody listens to the commands"),
    Parameter("priority", 50, "SCHED_FIFO priority asked for; 0 for none", 0, 98),
    Parameter("feed_priority", 30, "SCHED_FIFO priority asked for by the process that takes messages in; 0 for none",
              0, 98),
    Parameter("cpu", -1, "processor to stay on; -1 for any", -1, 1023),
    Parameter("lock_memory", True, "keep the controller's memory from being paged out"),
    Parameter("stay_awake", True, "keep idle processors out of sleep states that are slow to leave; costs power"),
    Parameter("status_period", 0.5, "s between diagnostics", 0.1, 60.0),
    *CONTROL,
)


def capsules_of(robot: Robot, said: str) -> str:
    """Path of the capsules that parameter `collision_model` asks for, empty for none."""
    if said != "auto":
        return said
    path = share_directory() / "config" / "robots" / f"{robot.name}_capsules.yaml"
    return str(path) if path.is_file() else ""


class ControllerNode(LifecycleNode):
    """See the file's first lines."""

    def __init__(self):
        super().__init__("controller")
        self._table = Parameters(self, PARAMETERS)
        self._process: ControllerProcess | None = None
        self._inputs: ControlInputs | None = None
        self._claim, self._born_ns = -1, time.monotonic_ns()

    def on_configure(self, state) -> TransitionCallbackReturn:
        try:
            self._configure(self._table.read())
        except VlaEdgeError as error:
            self.close()
            self.get_logger().error(f"configure failed: {error}")
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def _configure(self, values) -> None:
        self._values = values
        config = ControlConfig(**{row.name: getattr(values, row.name) for row in CONTROL})
        robot = load_robot(values.robot)
        joints = tuple(name for name in values.joints if name) or robot.driven
        if values.robot_description:
            robot.select(joints).check_within(Robot.from_urdf(values.robot_description), "robot_description")
        setup = SinkSetup(
            robot.select(joints), 1.0 / config.command_rate, self.resolve_topic_name("lowstate"),
            tuple(self.resolve_topic_name(f"dex3/{side}/cmd") for side in SIDES),
            FrameOptions(weight_ramp=values.unitree_weight_ramp, mode_pr=values.unitree_mode_pr,
                         waist=values.unitree_waist),
        )
        topic = self.resolve_topic_name(SINKS[values.sink].topic)
        command = (topic, values.sink, setup, self.get_namespace(), self.get_name())
        self._claim = claim(topic)
        refuse_second(self, SINKS[values.sink].message_type(), topic, self._born_ns)
        realtime = RealtimeRequest(
            values.priority, values.cpu if values.cpu >= 0 else None, values.lock_memory, values.stay_awake
        )
        self._process = ControllerProcess(robot, joints, config, CommandPublisher, command, realtime,
                                          clock=lambda: self.get_clock().now().nanoseconds, keep_open=(self._claim,),
                                          capsules=capsules_of(robot, values.collision_model),
                                          gravity=values.gravity_model)
        self._process.start()
        prioritize(values.feed_priority)
        self._inputs = ControlInputs(self, self._process, values.feed_priority)
        self._health = Health(self, robot.name)
        self._interventions = Interventions(self)
        self._timer = self.create_timer(values.status_period, self._report)

    def on_activate(self, state) -> TransitionCallbackReturn:
        self._inputs.arm_by_itself(self._values.rearm_on_activate)
        self._process.resume()
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        self._inputs.arm_by_itself(False)
        self._process.hold()
        return super().on_deactivate(state)

    def on_cleanup(self, state) -> TransitionCallbackReturn:
        self.close()
        self.destroy_timer(self._timer)
        self._health.destroy()
        self._interventions.destroy()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Ends the inputs and the controller's process."""
        if self._inputs is not None:
            self._inputs.destroy()
            self._inputs = None
        if self._process is not None:
            self._process.stop(3.0 + self._values.unitree_weight_ramp)
            self._process = None
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    def _report(self) -> None:
        report = self._process.report()
        self._interventions.tell(report)
        self._health.publish(*status_level(report, self._process.alive), status_values(report, self._inputs))


def main(args=None) -> None:
    """Runs the node."""
    run_node(ControllerNode, args, images=False)
