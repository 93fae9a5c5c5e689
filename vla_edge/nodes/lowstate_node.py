"""A Unitree G1's LowState as joint_states, which is what the VLA node, the controller and the recorder listen to.

Read in serialized form: rclpy would make an object of each of 35 motors, 500 times a second. Needs the message package
unitree_hg of unitree_ros2.
"""

from __future__ import annotations

import threading
import time

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import JointState

from vla_edge.nodes import convert, qos
from vla_edge.nodes.params import Parameter, Parameters
from vla_edge.nodes.run import prioritize, run_node
from vla_edge.nodes.stream import Stream, StreamThread
from vla_edge.nodes.unitree_sink import load_messages
from vla_edge.robots.robot import RobotError, load_robot
from vla_edge.robots.unitree_frame import StateFrameError, read_low_state
from vla_edge.types import NANOSECONDS

PARAMETERS = (
    Parameter("robot", "g1", "'g1', 'g1:<mode>', or a robot's YAML file with motor indices"),
    Parameter("check_crc", True, "refuse states whose checksum does not fit; unitree_mujoco sends none"),
    Parameter("priority", 30, "SCHED_FIFO priority asked for; 0 for none", 0, 98),
)


class LowStateNode(Node):
    """See the file's first lines."""

    def __init__(self):
        super().__init__("lowstate")
        values = Parameters(self, PARAMETERS).read()
        robot = load_robot(values.robot)
        indices = [joint.index for joint in robot.joints]
        if None in indices:
            raise RobotError(f"robot {robot.name!r} gives no motor index for some joints; use 'g1:<mode>'")
        self._motors, self._checked = np.array(indices), values.check_crc
        empty = np.zeros(len(indices))
        self._message = JointState(
            name=list(robot.joint_names), position=convert.doubles(empty), velocity=convert.doubles(empty),
            effort=convert.doubles(empty),
        )
        self._fields = [np.frombuffer(getattr(self._message, name)) for name in ("position", "velocity", "effort")]
        self._publisher = self.create_publisher(JointState, "joint_states", qos.SENSOR_OUT)
        stream = Stream(self, load_messages()[1], "lowstate", self._on_state, qos.SENSOR, raw=True)
        self._thread = StreamThread([stream], 0.0, "lowstate", values.priority)
        prioritize(values.priority, [threading.get_native_id()])

    def close(self) -> None:
        """Stops listening."""
        self._thread.close()

    def _on_state(self, frame: bytes, info) -> None:
        try:
            motors = read_low_state(frame, self._checked)["motor_state"]
        except StateFrameError as error:
            self.get_logger().error(str(error), throttle_duration_sec=5.0)
            return
        for field, name in zip(self._fields, ("q", "dq", "tau_est")):
            field[:] = motors[name][self._motors]
        # The robot's own clock is a counter: the moment of arrival is the best there is.
        stamp = self._message.header.stamp
        stamp.sec, stamp.nanosec = divmod(time.time_ns(), NANOSECONDS)
        self._publisher.publish(self._message)


def main(args=None) -> None:
    """Runs the node."""
    run_node(LowStateNode, args)
