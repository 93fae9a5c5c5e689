"""A joint command as the message a robot's driver takes; chosen by the controller's parameter `sink`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from builtin_interfaces.msg import Duration
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_edge.nodes.convert import doubles, to_time
from vla_edge.types import NANOSECONDS, JointCommand


@dataclass(frozen=True)
class Sink:
    """One kind of command message.

    Attributes:
        type: of the message.
        convert: command and s between commands -> message.
    """

    type: type
    convert: Callable[[JointCommand, float], object]


def _joint_state(command: JointCommand, period: float) -> JointState:
    message = JointState(name=list(command.names))
    message.header.stamp = to_time(command.stamp_ns)
    message.position = doubles(command.position)
    message.velocity = doubles(command.velocity)
    message.effort = doubles(command.effort)
    return message


def _float64_multi_array(command: JointCommand, period: float) -> Float64MultiArray:
    """For forward_command_controller: positions in the controller's joint order."""
    return Float64MultiArray(data=doubles(command.position))


def _joint_trajectory(command: JointCommand, period: float) -> JointTrajectory:
    """For joint_trajectory_controller: one point, due when the next command will be."""
    ns = round(period * NANOSECONDS)
    point = JointTrajectoryPoint(
        positions=doubles(command.position),
        velocities=doubles(command.velocity),
        time_from_start=Duration(sec=ns // NANOSECONDS, nanosec=ns % NANOSECONDS),
    )
    message = JointTrajectory(joint_names=list(command.names), points=[point])
    message.header.stamp = to_time(command.stamp_ns)
    return message


SINKS = {
    "joint_state": Sink(JointState, _joint_state),
    "float64_multi_array": Sink(Float64MultiArray, _float64_multi_array),
    "joint_trajectory": Sink(JointTrajectory, _joint_trajectory),
}
