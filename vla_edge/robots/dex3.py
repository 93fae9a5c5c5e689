"""The Unitree Dex3 hand: seven joints a side, their limits, and their command as plain data.

Limits and command: unitree_ros2 (`example/src/src/g1/dex3/g1_dex3_example.cpp`, `unitree_hg/msg/HandCmd.msg`); torques
and joint names: Unitree's G1 model with hands. Working velocity, acceleration and grasp torque are ours.
"""

from __future__ import annotations

import numpy as np

from vla_edge.control.modes import Mode
from vla_edge.robots.robot import Joint, Robot
from vla_edge.robots.unitree_frame import CDR_HEADER, MOTOR_CMD, MOTOR_STATE, StateFrameError
from vla_edge.types import JointCommand

SIDES = ("left", "right")
KP, KD = 1.5, 0.1
"""N.m/rad and N.m.s/rad, of Unitree's example when it grips."""
WORKING_VELOCITY, WORKING_ACCELERATION = 3.0, 60.0
GRASP_TORQUE = 0.5
"""N.m at which a closing finger stops, about a third of what its motor can do."""

# In motor order: (name, lower, upper, N.m, closing direction) of the left hand; the right one mirrors it.
_JOINTS = (
    ("thumb_0", -1.05, 1.05, 2.45, 0),
    ("thumb_1", -0.724, 1.05, 1.4, 1),
    ("thumb_2", 0.0, 1.75, 1.4, 1),
    ("middle_0", -1.57, 0.0, 1.4, -1),
    ("middle_1", -1.75, 0.0, 1.4, -1),
    ("index_0", -1.57, 0.0, 1.4, -1),
    ("index_1", -1.75, 0.0, 1.4, -1),
)


def dex3(side: str) -> tuple[Joint, ...]:
    """The joints of one hand, in motor order."""
    joints = []
    for name, lower, upper, effort, closing in _JOINTS:
        if side == "right":
            lower, upper, closing = -upper, -lower, -closing
        joints.append(
            Joint(f"{side}_hand_{name}_joint", lower, upper, WORKING_VELOCITY, WORKING_ACCELERATION, effort, KP, KD,
                  grasp_torque=closing * GRASP_TORQUE)
        )
    return tuple(joints)


HAND_JOINTS = {side: tuple(joint.name for joint in dex3(side)) for side in SIDES}
ALL_HAND_JOINTS = frozenset(HAND_JOINTS["left"] + HAND_JOINTS["right"])


def read_hand_state(frame: bytes) -> np.ndarray:
    """(7,) motor states of a serialized HandState, which begins with them. Raises StateFrameError."""
    start, count = len(CDR_HEADER), len(_JOINTS)
    told = int.from_bytes(frame[start : start + 4], "little")
    if frame[:2] != CDR_HEADER[:2] or told != count or len(frame) < start + 4 + count * MOTOR_STATE.itemsize:
        raise StateFrameError(
            f"a HandState of {told} motors in {len(frame)} bytes; a Dex3 has {count}. Is it another hand's?"
        )
    return np.frombuffer(frame, MOTOR_STATE, count, start + 4)


class HandFrame:
    """Serialized HandCmd messages of one hand.

    Args:
        robot: exactly the driven joints, in command order; those of other parts are left out.
        side: "left" or "right".
    """

    def __init__(self, robot: Robot, side: str):
        names = HAND_JOINTS[side]
        self._motors = np.array([i for i, name in enumerate(names) if name in robot.joint_names], int)
        self._places = np.array([robot.joint_names.index(names[i]) for i in self._motors], int)
        self._cmd = np.zeros(len(names), MOTOR_CMD)
        # Motor number, status enabled in bits 4 to 6, and in bit 7 the mark of a motor that is let go.
        self._driven, self._free = np.arange(len(names), dtype="u1") | 0x10, np.arange(len(names), dtype="u1") | 0x90
        self._gains = [robot.column(name)[self._places] for name in ("kp", "kd")]

    @property
    def driven(self) -> bool:
        """Whether any joint of this hand is driven."""
        return len(self._motors) > 0

    def fill(self, command: JointCommand, mode: Mode) -> bytes:
        """The message of one command; fingers that are not driven, and all in DAMP, are let go."""
        cmd, motors, places = self._cmd, self._motors, self._places
        cmd["mode"] = self._free
        if mode is Mode.DAMP:
            for name in ("q", "dq", "tau", "kp", "kd"):
                cmd[name] = 0.0
        else:
            cmd["mode"][motors] = self._driven[motors]
            cmd["q"][motors], cmd["dq"][motors] = command.position[places], command.velocity[places]
            cmd["tau"][motors] = command.effort[places]
            cmd["kp"][motors], cmd["kd"][motors] = self._gains
        return CDR_HEADER + len(cmd).to_bytes(4, "little") + cmd.tobytes() + bytes(16)
