"""A joint command as the message a robot's driver takes; chosen by the controller's parameter `sink`.

Each sink fills one message again and again: at 500 commands a second, making a message with its names and arrays anew
costs more than publishing it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from builtin_interfaces.msg import Duration
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_edge.nodes.convert import doubles
from vla_edge.types import NANOSECONDS, JointCommand


class Sink(Protocol):
    """Makes messages of commands.

    Attributes:
        type: of the message.
    """

    type: type

    def __call__(self, command: JointCommand):
        """The message for `command`; the same object at every call."""


class JointStateSink:
    """sensor_msgs/JointState: position targets with feed-forward velocity and effort."""

    type = JointState

    def __init__(self, names: tuple[str, ...], period: float):
        empty = np.zeros(len(names))
        self._message = JointState(
            name=list(names), position=doubles(empty), velocity=doubles(empty), effort=doubles(empty)
        )
        self._fields = [np.frombuffer(getattr(self._message, key)) for key in ("position", "velocity", "effort")]

    def __call__(self, command: JointCommand) -> JointState:
        stamp = self._message.header.stamp
        stamp.sec, stamp.nanosec = divmod(command.stamp_ns, NANOSECONDS)
        for field, values in zip(self._fields, (command.position, command.velocity, command.effort)):
            field[:] = values
        return self._message


class Float64MultiArraySink:
    """std_msgs/Float64MultiArray for forward_command_controller: positions in the controller's joint order."""

    type = Float64MultiArray

    def __init__(self, names: tuple[str, ...], period: float):
        self._message = Float64MultiArray(data=doubles(np.zeros(len(names))))
        self._data = np.frombuffer(self._message.data)

    def __call__(self, command: JointCommand) -> Float64MultiArray:
        self._data[:] = command.position
        return self._message


class JointTrajectorySink:
    """trajectory_msgs/JointTrajectory for joint_trajectory_controller: one point, due when the next command will be."""

    type = JointTrajectory

    def __init__(self, names: tuple[str, ...], period: float):
        ns, empty = round(period * NANOSECONDS), np.zeros(len(names))
        point = JointTrajectoryPoint(
            positions=doubles(empty), velocities=doubles(empty),
            time_from_start=Duration(sec=ns // NANOSECONDS, nanosec=ns % NANOSECONDS),
        )
        self._message = JointTrajectory(joint_names=list(names), points=[point])
        self._positions, self._velocities = np.frombuffer(point.positions), np.frombuffer(point.velocities)

    def __call__(self, command: JointCommand) -> JointTrajectory:
        stamp = self._message.header.stamp
        stamp.sec, stamp.nanosec = divmod(command.stamp_ns, NANOSECONDS)
        self._positions[:], self._velocities[:] = command.position, command.velocity
        return self._message


SINKS = {
    "joint_state": JointStateSink,
    "float64_multi_array": Float64MultiArraySink,
    "joint_trajectory": JointTrajectorySink,
}
