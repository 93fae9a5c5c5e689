"""Unitree's low-level command and state of the G1 as plain data, with their checksum; no message package.

Layout, checksum and meaning of the fields: unitree_ros2 (`unitree_hg/msg/LowCmd.msg`, `LowState.msg`,
`example/src/src/common/motor_crc_hg.cpp`, the arm_sdk and low-level examples). The
checksum is over the struct as C lays it out. The serialized message differs from it in one place: the first motor's
`mode`, a byte, follows the bytes before it without the padding that a struct within a struct gets.

Three fields make a frame dead without a word when they are left at zero: `mode` of each motor, `mode_machine`, `crc`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from vla_edge.control.modes import Mode
from vla_edge.robots.robot import Robot, RobotError
from vla_edge.types import JointCommand

MOTORS = 35
WEIGHT = 29
"""Motor whose position is the weight of arm_sdk against the robot's own controller, 0 to 1."""
PR, AB = 0, 1
"""`mode_pr`: ankles and waist commanded in pitch and roll, or by their two parallel motors A and B."""
PARALLEL = (4, 5, 10, 11, 13, 14)
"""Motors whose meaning depends on `mode_pr`."""
ARMS, WAIST = tuple(range(15, 29)), (12, 13, 14)
KINDS = ("arm_sdk", "lowcmd")
_LOCKED = ("waist_roll_joint", "waist_pitch_joint")
CDR_HEADER = b"\x00\x01\x00\x00"  # little endian, no options

MOTOR_CMD = np.dtype(
    [("mode", "u1"), ("q", "<f4"), ("dq", "<f4"), ("tau", "<f4"), ("kp", "<f4"), ("kd", "<f4"), ("reserve", "<u4")],
    align=True,
)
LOW_CMD = np.dtype(
    [("mode_pr", "u1"), ("mode_machine", "u1"), ("motor_cmd", MOTOR_CMD, (MOTORS,)), ("reserve", "<u4", (4,)),
     ("crc", "<u4")],
    align=True,
)
_LAST_FRAMES = 10
"""Repetitions of the last frame: one that is lost must not leave the robot with the one before."""
MOTOR_STATE = np.dtype(
    [("mode", "u1"), ("q", "<f4"), ("dq", "<f4"), ("ddq", "<f4"), ("tau_est", "<f4"), ("temperature", "<i2", (2,)),
     ("vol", "<f4"), ("sensor", "<u4", (2,)), ("motorstate", "<u4"), ("reserve", "<u4", (4,))],
    align=True,
)
LOW_STATE = np.dtype(
    [("version", "<u4", (2,)), ("mode_pr", "u1"), ("mode_machine", "u1"), ("tick", "<u4"), ("imu", "<f4", (13,)),
     ("imu_temperature", "<i2"), ("motor_state", MOTOR_STATE, (MOTORS,)), ("wireless_remote", "u1", (40,)),
     ("reserve", "<u4", (4,)), ("crc", "<u4")],
    align=True,
)
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class RevisionError(RobotError):
    """The robot that answers is not the one whose limits were loaded."""


def crc32(words: bytes) -> int:
    """Checksum of little-endian 32-bit words, most significant bit first, polynomial 0x04C11DB7, begun at all ones.

    zlib's runs the same polynomial from the least significant bit, so it is given the bits in reverse.
    """
    big_endian = np.frombuffer(words, "<u4").byteswap().tobytes()
    mirrored = zlib.crc32(big_endian.translate(_REVERSED)) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED), "big")


class StateFrameError(RobotError):
    """Bytes that are no LowState of this robot."""


def read_low_state(frame: bytes, checked: bool = True) -> np.void:
    """The record in a serialized LowState.

    Args:
        checked: hold it to its checksum; the simulators of unitree_mujoco send none.

    Raises:
        StateFrameError: another size, or a checksum that does not fit.
    """
    # Without the header it is shorter by as much as the header is long: see the padding above.
    if len(frame) != LOW_STATE.itemsize or frame[:2] != CDR_HEADER[:2]:
        raise StateFrameError(
            f"a LowState of {len(frame)} bytes; one of unitree_hg has {LOW_STATE.itemsize} in little endian. Is it "
            "another robot's?"
        )
    start = LOW_STATE.fields["motor_state"][1]
    body = frame[len(CDR_HEADER) :]
    body = body[: start - 2] + b"\0\0" + body[start - 2 : start] + b"\0\0" + body[start:]
    record = np.frombuffer(body, LOW_STATE)[0]
    if checked and record["crc"] != crc32(body[:-4]):
        raise StateFrameError(f"a LowState's checksum is {record['crc']:#x}, its content says {crc32(body[:-4]):#x}")
    return record


@dataclass(frozen=True)
class FrameOptions:
    """How a G1 is commanded.

    Attributes:
        kind: "arm_sdk": arms over the robot's own balance, by weight; "lowcmd": every motor, the robot hung up.
        weight_ramp: s for the weight from 0 to 1, and back when the controller ends.
        mode_pr: PR or AB.
        waist: command the driven waist joints through arm_sdk too; users report that this upsets balance.
        damping: N.m.s/rad of DAMP, and of motors of lowcmd that are not driven.
    """

    kind: str = "arm_sdk"
    weight_ramp: float = 1.0
    mode_pr: int = PR
    waist: bool = False
    damping: float = 8.0


class UnitreeFrame:
    """Fills one frame again and again.

    Args:
        robot: exactly the driven joints, in command order, with motor indices and gains.
        options: see there.
        mode_machine: as the robot's LowState tells it; echoed in every frame.
        period: s between frames.

    Attributes:
        weight: of arm_sdk, 0 to 1.

    Raises:
        RobotError: a joint without index or gains, or one that `options` cannot command.
    """

    def __init__(self, robot: Robot, options: FrameOptions, mode_machine: int, period: float):
        self._options, self.weight, self._rise = options, 0.0, period / options.weight_ramp
        chosen = _commanded(robot, options)
        self._chosen = np.array(chosen)
        self._motors = np.array([robot.joints[i].index for i in chosen])
        self._kp, self._kd = robot.column("kp")[self._chosen], robot.column("kd")[self._chosen]
        self._record = np.zeros(1, LOW_CMD)
        self._cmd = self._record["motor_cmd"][0]
        self._record["mode_pr"], self._record["mode_machine"] = options.mode_pr, mode_machine
        if options.kind == "lowcmd":
            self._cmd["mode"][:WEIGHT], self._cmd["kd"][:WEIGHT] = 1, options.damping
        self._cmd["mode"][self._motors] = 1

    def fill(self, command: JointCommand, mode: Mode) -> bytes:
        """The serialized frame of one command; the weight rises by one period's share."""
        cmd, motors, chosen = self._cmd, self._motors, self._chosen
        if mode is Mode.DAMP:
            self._damp()
        else:
            cmd["q"][motors], cmd["dq"][motors] = command.position[chosen], command.velocity[chosen]
            cmd["tau"][motors] = command.effort[chosen]
            cmd["kp"][motors], cmd["kd"][motors] = self._kp, self._kd
        self.weight = min(self.weight + self._rise, 1.0)
        return self._sealed()

    def farewell(self) -> list[bytes]:
        """The frames that end it: arm_sdk's weight led to zero, or every motor of lowcmd left damped."""
        frames = []
        if self._options.kind == "lowcmd":
            self._damp()
            return [self._sealed()] * _LAST_FRAMES
        self._cmd["dq"][self._motors] = 0.0
        while self.weight > 0.0:
            self.weight = max(self.weight - self._rise, 0.0)
            frames.append(self._sealed())
        return frames + [self._sealed()] * _LAST_FRAMES

    def _damp(self) -> None:
        for name in ("q", "dq", "tau", "kp"):
            self._cmd[name][self._motors] = 0.0
        self._cmd["kd"][self._motors] = self._options.damping

    def _sealed(self) -> bytes:
        if self._options.kind == "arm_sdk":
            self._cmd["q"][WEIGHT] = self.weight
        record = self._record
        record["crc"] = crc32(record.tobytes()[:-4])
        body = record.tobytes()
        return CDR_HEADER + body[:2] + body[4:6] + body[8:]


def _commanded(robot: Robot, options: FrameOptions) -> list[int]:
    """Places of the joints that go into the frame."""
    if options.kind not in KINDS:
        raise RobotError(f"a Unitree frame is one of {', '.join(KINDS)}, not {options.kind!r}")
    from vla_edge.robots.dex3 import ALL_HAND_JOINTS

    chosen = []
    for place, joint in enumerate(robot.joints):
        if joint.name in ALL_HAND_JOINTS:
            continue  # they have a bus of their own
        if joint.index is None or not 0 <= joint.index < WEIGHT:
            raise RobotError(f"joint {joint.name!r} has no motor of a G1 (index 0 to 28); use the robot 'g1:<mode>'")
        if options.kind == "arm_sdk" and joint.index in WAIST and not options.waist:
            continue
        if options.kind == "arm_sdk" and joint.index not in (*ARMS, *WAIST):
            raise RobotError(f"joint {joint.name!r} belongs to the legs, which arm_sdk leaves to the robot's balance")
        if options.mode_pr == AB and joint.index in PARALLEL:
            raise RobotError(
                f"joint {joint.name!r} means another motor in AB mode; command it in PR mode, as its limits are meant"
            )
        if joint.kp <= 0.0 or joint.kd <= 0.0:
            raise RobotError(f"joint {joint.name!r} has kp {joint.kp:g} and kd {joint.kd:g}; a motor needs both")
        chosen.append(place)
    if not chosen:
        raise RobotError("none of the driven joints can be commanded by this sink; drive the arms")
    return chosen


def check_revision(robot: Robot, mode_machine: int) -> None:
    """Refuse a robot whose hardware is not the one the limits are for.

    Args:
        robot: exactly the driven joints.
        mode_machine: as its LowState tells it.

    Raises:
        RevisionError: another hardware mode, a joint that mode has locked, or limits wider than its own.
    """
    from vla_edge.robots.dex3 import ALL_HAND_JOINTS
    from vla_edge.robots.g1 import g1

    try:
        real = g1(mode_machine)
    except RobotError as error:
        raise RevisionError(
            f"the robot says mode_machine {mode_machine}, which is no 29-joint G1 known: {error}"
        ) from None
    if robot.revision is not None and robot.revision != mode_machine:
        raise RevisionError(
            f"the robot says mode_machine {mode_machine}, the limits are for {robot.revision}; "
            f"start with robot:=g1:{mode_machine}"
        )
    body = [joint for joint in robot.joints if joint.name not in ALL_HAND_JOINTS]
    for joint in body:
        if joint.name in _LOCKED and joint.name not in real.joint_names:
            raise RevisionError(f"joint {joint.name!r} is locked in hardware mode {mode_machine}; do not drive it")
        if joint.name in real.joint_names and joint.index != real.joint(joint.name).index:
            raise RevisionError(
                f"joint {joint.name!r} has motor index {joint.index}; it is {real.joint(joint.name).index}"
            )
    try:
        for joint in body:
            replace(robot, joints=(joint,), driven=()).check_within(real, f"hardware mode {mode_machine}")
    except RobotError as error:
        raise RevisionError(str(error)) from None
