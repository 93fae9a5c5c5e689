"""A Unitree frame is byte for byte what the robot's own tools would send, and never silently dead."""

import struct
from dataclasses import replace

import numpy as np
import pytest

from vla_edge.control.modes import Mode
from vla_edge.robots.g1 import DRIVEN_JOINTS, LEFT_ARM, RIGHT_ARM, g1
from vla_edge.robots.robot import RobotError
from vla_edge.robots.unitree_frame import (
    AB,
    CDR_HEADER,
    LOW_STATE,
    WEIGHT,
    FrameOptions,
    RevisionError,
    StateFrameError,
    UnitreeFrame,
    check_revision,
    crc32,
    read_low_state,
)
from vla_edge.types import JointCommand

ARMS = LEFT_ARM + RIGHT_ARM
# As the robot's C++ and Python tools lay the structs out.
LOW_CMD_FORMAT = "<2B2x" + "B3x5fI" * 35 + "5I"
LOW_STATE_FORMAT = "<2I2B2xI" + "13fh2x" + "B3x4f2hf7I" * 35 + "40B5I"
DEFINITIONS = {
    "unitree_hg/msg/MotorCmd": "uint8 mode\nfloat32 q\nfloat32 dq\nfloat32 tau\nfloat32 kp\nfloat32 kd\nuint32 reserve",
    "unitree_hg/msg/LowCmd": (
        "uint8 mode_pr\nuint8 mode_machine\nunitree_hg/MotorCmd[35] motor_cmd\nuint32[4] reserve\nuint32 crc"
    ),
    "unitree_hg/msg/IMUState": (
        "float32[4] quaternion\nfloat32[3] gyroscope\nfloat32[3] accelerometer\nfloat32[3] rpy\nint16 temperature"
    ),
    "unitree_hg/msg/MotorState": (
        "uint8 mode\nfloat32 q\nfloat32 dq\nfloat32 ddq\nfloat32 tau_est\nint16[2] temperature\nfloat32 vol\n"
        "uint32[2] sensor\nuint32 motorstate\nuint32[4] reserve"
    ),
    "unitree_hg/msg/LowState": (
        "uint32[2] version\nuint8 mode_pr\nuint8 mode_machine\nuint32 tick\nunitree_hg/IMUState imu_state\n"
        "unitree_hg/MotorState[35] motor_state\nuint8[40] wireless_remote\nuint32[4] reserve\nuint32 crc"
    ),
}


def crc_bit_by_bit(words: bytes) -> int:
    """CRC-32/MPEG-2 over the words' bytes, most significant first: the definition, without tables."""
    crc = 0xFFFFFFFF
    for (word,) in struct.iter_unpack("<I", words):
        for bit in range(31, -1, -1):
            high = crc >> 31
            crc = (crc << 1) & 0xFFFFFFFF
            if high ^ ((word >> bit) & 1):
                crc ^= 0x04C11DB7
    return crc


@pytest.fixture(scope="module")
def store():
    """Another library's serializer, fed with the robot's message definitions."""
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    types = {}
    for name, text in DEFINITIONS.items():
        types.update(get_types_from_msg(text, name))
    store.register(types)
    return store


def command(robot, seed=0):
    return JointCommand(0, robot.joint_names, *np.random.default_rng(seed).normal(size=(3, len(robot.joints))))


def frame_of(names=ARMS, mode_machine=15, **options):
    robot = g1().select(names)
    return robot, UnitreeFrame(robot, FrameOptions(**options), mode_machine, 0.002)


def unpack(frame: bytes):
    """(mode_pr, mode_machine, (35, 7) motors, crc) after checking the checksum bit by bit."""
    assert frame[:4] == CDR_HEADER and len(frame) == struct.calcsize(LOW_CMD_FORMAT)
    body = frame[4:6] + b"\0\0" + frame[6:8] + b"\0\0" + frame[8:]
    values = struct.unpack(LOW_CMD_FORMAT, body)
    assert values[-1] == crc_bit_by_bit(body[:-4]) != 0
    return values[0], values[1], np.array(values[2:247], float).reshape(35, 7), values[-1]


def test_the_checksum_is_the_catalogues():
    # 0x0376E6E7 is the check value of CRC-32/MPEG-2 over "123456789": checked on our bit-by-bit definition first.
    crc = 0xFFFFFFFF
    for byte in b"123456789":
        for bit in range(7, -1, -1):
            crc = ((crc << 1) & 0xFFFFFFFF) ^ (0x04C11DB7 if (crc >> 31) ^ ((byte >> bit) & 1) else 0)
    assert crc == 0x0376E6E7
    rng = np.random.default_rng(0)
    for words in (1, 2, 250):
        data = rng.integers(0, 256, 4 * words, dtype=np.uint8).tobytes()
        assert crc32(data) == crc_bit_by_bit(data)


def test_a_frame_is_the_serialized_message_of_another_library(store):
    robot, frame = frame_of()
    ours, given = frame.fill(command(robot), Mode.FOLLOW), command(robot)
    motor, low_cmd = (store.types[f"unitree_hg/msg/{name}"] for name in ("MotorCmd", "LowCmd"))
    motors = [motor(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0) for _ in range(35)]
    for joint, q, dq, tau in zip(robot.joints, given.position, given.velocity, given.effort):
        motors[joint.index] = motor(1, *(np.float32(v) for v in (q, dq, tau, 60.0, 1.5)), 0)
    motors[WEIGHT] = motor(0, np.float32(0.002), 0.0, 0.0, 0.0, 0.0, 0)
    flat = [value for m in motors for value in (m.mode, m.q, m.dq, m.tau, m.kp, m.kd, m.reserve)]
    crc = crc_bit_by_bit(struct.pack(LOW_CMD_FORMAT, 0, 15, *flat, *[0] * 5)[:-4])
    message = low_cmd(0, 15, motors, np.zeros(4, np.uint32), crc)
    assert bytes(store.serialize_cdr(message, "unitree_hg/msg/LowCmd")) == ours


def test_only_the_driven_arms_are_alive_and_every_needed_field_is_set():
    robot, frame = frame_of(names=DRIVEN_JOINTS, mode_machine=5)
    pr, machine, motors, _ = unpack(frame.fill(command(robot), Mode.FOLLOW))
    assert (pr, machine) == (0, 5)
    alive = np.flatnonzero(motors[:, 0])
    assert alive.tolist() == list(range(15, 29))  # the waist yaw is driven, but left to the robot's balance
    assert (motors[alive, 4] == 60).all() and (motors[alive, 5] == 1.5).all()
    rest = np.delete(motors, [*alive, WEIGHT], axis=0)
    assert not rest.any()


def test_the_waist_is_commanded_only_when_asked_for():
    robot, frame = frame_of(names=DRIVEN_JOINTS, waist=True)
    motors = unpack(frame.fill(command(robot), Mode.FOLLOW))[2]
    assert motors[12, 0] == 1 and motors[12, 1] == np.float32(command(robot).position[-1])


def test_the_weight_is_led_in_and_fully_out_and_faults_do_not_touch_it():
    robot, frame = frame_of(weight_ramp=0.1)
    rise = [unpack(frame.fill(command(robot), Mode.HOLD))[2][WEIGHT, 1] for _ in range(60)]
    np.testing.assert_allclose(rise, np.minimum(np.arange(1, 61) * 0.02, 1.0), atol=1e-6)
    assert unpack(frame.fill(command(robot), Mode.FAULT))[2][WEIGHT, 1] == 1.0
    last = unpack(frame.fill(command(robot, 1), Mode.FAULT))[2]
    farewell = [unpack(one)[2] for one in frame.farewell()]
    fall = np.array([motors[WEIGHT, 1] for motors in farewell])
    assert (np.diff(fall) <= 0).all() and np.abs(np.diff(np.append(1.0, fall))).max() < 0.02 + 1e-6
    assert fall[-5:].tolist() == [0.0] * 5
    # The arms are held where they were while the weight goes.
    assert all((motors[15:29, 1] == last[15:29, 1]).all() and (motors[15:29, 4] == 60).all() for motors in farewell)


def test_a_weight_that_has_not_fully_risen_is_led_out_from_where_it_is():
    robot, frame = frame_of(weight_ramp=0.1)
    for _ in range(10):
        frame.fill(command(robot), Mode.HOLD)
    assert unpack(frame.farewell()[0])[2][WEIGHT, 1] == pytest.approx(0.18)


def test_damp_has_no_stiffness_and_unitrees_damping():
    robot, frame = frame_of()
    frame.fill(command(robot), Mode.FOLLOW)
    motors = unpack(frame.fill(command(robot), Mode.DAMP))[2][15:29]
    assert not motors[:, 1:5].any() and (motors[:, 5] == 8.0).all() and (motors[:, 0] == 1).all()
    motors = unpack(frame.fill(command(robot), Mode.HOLD))[2][15:29]
    assert (motors[:, 4] == 60).all() and (motors[:, 5] == 1.5).all()


def test_lowcmd_damps_what_is_not_driven_and_everything_at_the_end():
    robot, frame = frame_of(kind="lowcmd", names=DRIVEN_JOINTS)
    motors = unpack(frame.fill(command(robot), Mode.FOLLOW))[2]
    assert (motors[:29, 0] == 1).all() and not motors[29:].any()
    assert (motors[:12, 5] == 8.0).all() and not motors[:12, 1:5].any()
    assert motors[12, 4] == 60 and motors[12, 1] == np.float32(command(robot).position[-1])
    motors = unpack(frame.farewell()[-1])[2][:29]
    assert not motors[:, 1:5].any() and (motors[:, 5] == 8.0).all()


@pytest.mark.parametrize(
    "names, options, says",
    [
        (("left_knee_joint",), {}, "legs"),
        (("waist_yaw_joint",), {}, "drive the arms"),
        (("waist_roll_joint",), {"waist": True, "mode_pr": AB}, "AB mode"),
        (("left_ankle_roll_joint",), {"kind": "lowcmd", "mode_pr": AB}, "AB mode"),
        (ARMS, {"kind": "highcmd"}, "arm_sdk, lowcmd"),
    ],
)
def test_what_a_sink_cannot_command_is_refused(names, options, says):
    with pytest.raises(RobotError, match=says):
        frame_of(names, **options)


@pytest.mark.parametrize("changes, says", [({"index": None}, "no motor"), ({"index": 29}, "no motor"), ({"kp": 0.0}, "kp")])
def test_a_joint_without_motor_or_gains_is_refused(changes, says):
    robot = g1().select(ARMS)
    robot = replace(robot, joints=(replace(robot.joints[0], **changes), *robot.joints[1:]))
    with pytest.raises(RobotError, match=says):
        UnitreeFrame(robot, FrameOptions(), 15, 0.002)


def test_the_right_revision_is_accepted_in_every_mode():
    for mode in (5, 11, 12, 13, 14, 15, 16):
        check_revision(g1(mode).select(ARMS), mode)


def test_another_revision_is_refused_with_how_to_start():
    with pytest.raises(RevisionError, match="robot:=g1:5"):
        check_revision(g1(15).select(ARMS), 5)
    with pytest.raises(RevisionError, match="no 29-joint G1"):
        check_revision(g1(15).select(ARMS), 10)


def test_limits_wider_than_the_revisions_are_refused_by_joint():
    robot = replace(g1(11).select(ARMS), revision=None)
    with pytest.raises(RevisionError, match="left_wrist_pitch_joint.*torque"):
        check_revision(replace(g1(15).select(ARMS), revision=None), 11)
    check_revision(robot, 15)  # stricter limits are fine
    wide = replace(robot.joints[3], upper=2.5)
    with pytest.raises(RevisionError, match="left_elbow_joint.*upper limit"):
        check_revision(replace(robot, joints=(*robot.joints[:3], wide, *robot.joints[4:])), 11)
    with pytest.raises(RevisionError, match="locked"):
        check_revision(replace(g1(15).select(("waist_roll_joint",)), revision=None), 16)


def state_frame(seed=0, mode_machine=15) -> bytes:
    rng = np.random.default_rng(seed)
    motors = []
    for _ in range(35):
        motors += [1, *rng.normal(size=4), 40, 41, 24.0, *[0] * 7]
    values = [1, 0, 0, mode_machine, 77, *rng.normal(size=13), 30, *motors, *[0] * 40, *[0] * 4]
    body = struct.pack(LOW_STATE_FORMAT[:-2] + "4I", *values)
    return CDR_HEADER + body[:70] + body[72:74] + body[76:] + struct.pack("<I", crc_bit_by_bit(body))


def test_a_state_is_read_as_another_library_reads_it(store):
    frame = state_frame(3)
    assert LOW_STATE.itemsize == struct.calcsize(LOW_STATE_FORMAT)
    ours, theirs = read_low_state(frame), store.deserialize_cdr(frame, "unitree_hg/msg/LowState")
    assert ours["mode_machine"] == theirs.mode_machine == 15 and ours["tick"] == theirs.tick == 77
    for index in (0, 15, 34):
        motor = theirs.motor_state[index]
        assert ours["motor_state"][index]["q"] == np.float32(motor.q)
        assert ours["motor_state"][index]["tau_est"] == np.float32(motor.tau_est)


def test_a_damaged_or_foreign_state_is_refused():
    frame = bytearray(state_frame())
    frame[300] ^= 1
    with pytest.raises(StateFrameError, match="checksum"):
        read_low_state(bytes(frame))
    assert read_low_state(bytes(frame), checked=False)["mode_machine"] == 15
    with pytest.raises(StateFrameError, match="another robot"):
        read_low_state(bytes(frame[:-8]))
