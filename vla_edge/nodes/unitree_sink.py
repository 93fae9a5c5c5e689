"""Commands for a Unitree G1, over `arm_sdk` or `lowcmd`; needs the message package unitree_hg of unitree_ros2.

The frame is serialized by `robots.unitree_frame`; unitree_hg is needed only for the type of the topics.
"""

from __future__ import annotations

import dataclasses
import time

from vla_edge.control.modes import Mode
from vla_edge.nodes import qos
from vla_edge.nodes.stream import Stream
from vla_edge.robots.dex3 import SIDES, HandFrame
from vla_edge.robots.unitree_frame import UnitreeFrame, check_revision, read_low_state
from vla_edge.types import JointCommand, VlaEdgeError

PATIENCE_S = 5.0
"""s to wait for the robot's first LowState."""


class SinkError(VlaEdgeError):
    """A sink whose messages, robot or rights are not there."""


class ArmSdkSink:
    """The arms, over the robot's own balance controller: weight led in when armed and out at the end.

    Args:
        setup: `sinks.SinkSetup`.
        node: asks for the robot's state once, for the `mode_machine` that every frame echoes.

    Raises:
        SinkError: unitree_hg is not installed, or the robot does not answer.
        RevisionError: the robot is another revision than the limits are for.
        RobotError: joints this sink cannot command.
    """

    kind, topic = "arm_sdk", "arm_sdk"

    def __init__(self, setup, node):
        mode_machine = ask_mode_machine(node, load_messages()[1], setup.state_topic)
        check_revision(setup.robot, mode_machine)
        options = dataclasses.replace(setup.frame, kind=self.kind)
        self._frame = UnitreeFrame(setup.robot, options, mode_machine, setup.period)
        self.farewell = self._frame.farewell
        hands = [(topic, HandFrame(setup.robot, side)) for side, topic in zip(SIDES, setup.hand_topics)]
        self.others = [(topic, load_messages()[2], hand.fill) for topic, hand in hands if hand.driven]

    @staticmethod
    def message_type() -> type:
        return load_messages()[0]

    def __call__(self, command: JointCommand, mode: Mode) -> bytes:
        return self._frame.fill(command, mode)


class LowCmdSink(ArmSdkSink):
    """Every motor, the robot hung up and its own controller released; motors that are not driven are damped."""

    kind, topic = "lowcmd", "lowcmd"


def load_messages() -> tuple[type, ...]:
    """(LowCmd, LowState, HandCmd, HandState). Raises SinkError."""
    try:
        from unitree_hg.msg import HandCmd, HandState, LowCmd, LowState
    except ImportError as error:
        raise SinkError(
            f"Unitree's sinks need the message package unitree_hg: build unitree_ros2 and source it ({error})"
        ) from None
    return LowCmd, LowState, HandCmd, HandState


def ask_mode_machine(node, state_type: type, topic: str, patience: float = PATIENCE_S) -> int:
    """`mode_machine` of the first LowState on `topic`. Raises SinkError when none comes."""
    heard: list[bytes] = []
    stream = Stream(node, state_type, topic, lambda message, info: heard.append(message), qos.SENSOR, raw=True)
    deadline = time.monotonic() + patience
    while not stream.drain() and time.monotonic() < deadline:
        time.sleep(0.01)
    stream.destroy()
    if not heard:
        raise SinkError(
            f"no LowState on {topic} within {patience:g} s; is the robot on, its network reachable (CycloneDDS on the "
            "right interface), and the topic mapped?"
        )
    return int(read_low_state(heard[0], checked=False)["mode_machine"])
