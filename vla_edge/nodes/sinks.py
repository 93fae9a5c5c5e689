"""A joint command as the message a robot's driver takes; chosen by the controller's parameter `sink`.

Each sink fills one message again and again: at 500 commands a second, making a message with its names and arrays anew
costs more than publishing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from builtin_interfaces.msg import Duration
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_edge.control.modes import Mode
from vla_edge.nodes.convert import doubles
from vla_edge.nodes.unitree_sink import ArmSdkSink, LowCmdSink
from vla_edge.robots.robot import Robot
from vla_edge.robots.unitree_frame import FrameOptions
from vla_edge.types import NANOSECONDS, JointCommand


@dataclass(frozen=True)
class SinkSetup:
    """What a sink is made for; pickled on its way to the controller's process.

    Attributes:
        robot: exactly the driven joints, in command order.
        period: s between commands.
        state_topic: resolved name of the robot's own state, for sinks that ask it something.
        hand_topics: resolved names of the left and right hand's commands, for sinks that have hands.
        frame: for Unitree's sinks.
    """

    robot: Robot
    period: float
    state_topic: str = "/lowstate"
    hand_topics: tuple[str, str] = ("/dex3/left/cmd", "/dex3/right/cmd")
    frame: FrameOptions = FrameOptions()


class Sink(Protocol):
    """Makes messages of commands. Made with (SinkSetup, rclpy node); may carry `farewell()`, the messages that end it,
    and `others`, further outlets as (topic, type, function like the sink's own).

    Attributes:
        topic: relative name that commands go to.
    """

    topic: str

    @staticmethod
    def message_type() -> type:
        """Of the topic."""

    def __call__(self, command: JointCommand, mode: Mode):
        """The message for `command`, serialized or the same object at every call."""


class JointStateSink:
    """sensor_msgs/JointState: position targets with feed-forward velocity and effort."""

    topic = "joint_command"

    @staticmethod
    def message_type() -> type:
        return JointState

    def __init__(self, setup: SinkSetup, node=None):
        names = setup.robot.joint_names
        empty = np.zeros(len(names))
        self._message = JointState(
            name=list(names), position=doubles(empty), velocity=doubles(empty), effort=doubles(empty)
        )
        self._fields = [np.frombuffer(getattr(self._message, key)) for key in ("position", "velocity", "effort")]

    def __call__(self, command: JointCommand, mode: Mode) -> JointState:
        stamp = self._message.header.stamp
        stamp.sec, stamp.nanosec = divmod(command.stamp_ns, NANOSECONDS)
        for field, values in zip(self._fields, (command.position, command.velocity, command.effort)):
            field[:] = values
        return self._message


class Float64MultiArraySink:
    """std_msgs/Float64MultiArray for forward_command_controller: positions in the controller's joint order."""

    topic = "joint_command"

    @staticmethod
    def message_type() -> type:
        return Float64MultiArray

    def __init__(self, setup: SinkSetup, node=None):
        self._message = Float64MultiArray(data=doubles(np.zeros(len(setup.robot.joints))))
        self._data = np.frombuffer(self._message.data)

    def __call__(self, command: JointCommand, mode: Mode) -> Float64MultiArray:
        self._data[:] = command.position
        return self._message


class JointTrajectorySink:
    """trajectory_msgs/JointTrajectory for joint_trajectory_controller: one point, due when the next command will be."""

    topic = "joint_command"

    @staticmethod
    def message_type() -> type:
        return JointTrajectory

    def __init__(self, setup: SinkSetup, node=None):
        names = setup.robot.joint_names
        ns, empty = round(setup.period * NANOSECONDS), np.zeros(len(names))
        point = JointTrajectoryPoint(
            positions=doubles(empty), velocities=doubles(empty),
            time_from_start=Duration(sec=ns // NANOSECONDS, nanosec=ns % NANOSECONDS),
        )
        self._message = JointTrajectory(joint_names=list(names), points=[point])
        self._positions, self._velocities = np.frombuffer(point.positions), np.frombuffer(point.velocities)

    def __call__(self, command: JointCommand, mode: Mode) -> JointTrajectory:
        stamp = self._message.header.stamp
        stamp.sec, stamp.nanosec = divmod(command.stamp_ns, NANOSECONDS)
        self._positions[:], self._velocities[:] = command.position, command.velocity
        return self._message


SINKS = {
    "joint_state": JointStateSink,
    "float64_multi_array": Float64MultiArraySink,
    "joint_trajectory": JointTrajectorySink,
    "unitree_arm_sdk": ArmSdkSink,
    "unitree_lowcmd": LowCmdSink,
}
