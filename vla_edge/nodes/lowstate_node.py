"""A Unitree G1's LowState, and its hands' HandState, as the joint_states that the package's other nodes listen to.

Read in serialized form: rclpy would make an object of each of 35 motors, 500 times a second. Needs the message package
unitree_hg of unitree_ros2.
"""

from __future__ import annotations

import functools
import threading
import time

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import JointState

from vla_edge.control.realtime import prioritize
from vla_edge.nodes import convert, qos
from vla_edge.nodes.params import Parameter, Parameters
from vla_edge.nodes.run import run_node
from vla_edge.nodes.stream import Stream, StreamThread
from vla_edge.nodes.unitree_sink import load_messages
from vla_edge.robots.dex3 import HAND_JOINTS, SIDES, read_hand_state
from vla_edge.robots.robot import RobotError, load_robot
from vla_edge.robots.unitree_frame import StateFrameError, read_low_state
from vla_edge.types import NANOSECONDS

PARAMETERS = (
    Parameter("robot", "g1", "'g1', 'g1:<mode>', either with '+dex3' for hands, or a YAML file with motor indices"),
    Parameter("check_crc", True, "refuse states whose checksum does not fit; unitree_mujoco sends none"),
    Parameter("hand_timeout", 0.1, "s after which a silent hand's joints count as not measured", 0.01, 5.0),
    Parameter("priority", 30, "SCHED_FIFO priority asked for; 0 for none", 0, 98),
)
FIELDS = (("position", "q"), ("velocity", "dq"), ("effort", "tau_est"))


class LowStateNode(Node):
    """See the file's first lines."""

    def __init__(self):
        super().__init__("lowstate")
        values = Parameters(self, PARAMETERS).read()
        names = load_robot(values.robot).joint_names
        motors = {joint.name: joint.index for joint in load_robot(values.robot).joints}
        self._checked, self._hand_timeout = values.check_crc, values.hand_timeout
        # Places in the message: of the body's joints, and of each hand's.
        hands = {side: [names.index(name) for name in HAND_JOINTS[side] if name in names] for side in SIDES}
        self._hands = {side: places for side, places in hands.items() if len(places) == len(HAND_JOINTS[side])}
        self._body = [i for i in range(len(names)) if i not in sum(self._hands.values(), [])]
        if any(motors[names[i]] is None for i in self._body):
            raise RobotError(f"robot {values.robot!r} gives no motor index for some joints; use 'g1:<mode>'")
        self._motors = np.array([motors[names[i]] for i in self._body])
        self._heard = dict.fromkeys(self._hands, float("-inf"))
        empty = np.full(len(names), np.nan)
        self._message = JointState(name=list(names), **{field: convert.doubles(empty) for field, _ in FIELDS})
        self._fields = {field: np.frombuffer(getattr(self._message, field)) for field, _ in FIELDS}
        self._publisher = self.create_publisher(JointState, "joint_states", qos.SENSOR_OUT)
        _, state, _, hand = load_messages()
        streams = [Stream(self, state, "lowstate", self._on_state, qos.SENSOR, raw=True)]
        for side in self._hands:
            take = functools.partial(self._on_hand, side)
            streams.append(Stream(self, hand, f"dex3/{side}/state", take, qos.SENSOR, raw=True))
        self._thread = StreamThread(streams, 0.0, "lowstate", values.priority)
        prioritize(values.priority, [threading.get_native_id()])

    def close(self) -> None:
        """Stops listening."""
        self._thread.close()

    def _on_hand(self, side: str, frame: bytes, info) -> None:
        self._heard[side] = time.monotonic()
        self._take(self._hands[side], lambda: read_hand_state(frame))

    def _on_state(self, frame: bytes, info) -> None:
        if not self._take(self._body, lambda: read_low_state(frame, self._checked)["motor_state"][self._motors]):
            return
        for side, heard in self._heard.items():
            if time.monotonic() - heard > self._hand_timeout:
                # The controller refuses what is not finite, and stops for want of a measurement.
                for values in self._fields.values():
                    values[self._hands[side]] = np.nan
        # The robot's own clock is a counter: the moment of arrival is the best there is.
        stamp = self._message.header.stamp
        stamp.sec, stamp.nanosec = divmod(time.time_ns(), NANOSECONDS)
        self._publisher.publish(self._message)

    def _take(self, places: list[int], read) -> bool:
        try:
            motors = read()
        except StateFrameError as error:
            self.get_logger().error(str(error), throttle_duration_sec=5.0)
            return False
        for field, name in FIELDS:
            self._fields[field][places] = motors[name]
        return True


def main(args=None) -> None:
    """Runs the node."""
    run_node(LowStateNode, args, images=False)
