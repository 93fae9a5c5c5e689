"""Hands have their own limits, mirror each other, and their frames are another library's."""

import numpy as np
import pytest
from test_unitree_frame import DEFINITIONS

from vla_edge.control.modes import Mode
from vla_edge.robots.dex3 import HAND_JOINTS, HandFrame, dex3, read_hand_state
from vla_edge.robots.g1 import DRIVEN_JOINTS, LEFT_ARM, g1
from vla_edge.robots.robot import RobotError, load_robot
from vla_edge.robots.unitree_frame import CDR_HEADER, FrameOptions, StateFrameError, UnitreeFrame, check_revision
from vla_edge.types import JointCommand


def test_limits_are_those_of_unitrees_example_and_the_hands_mirror_each_other():
    left, right = dex3("left"), dex3("right")
    assert [(j.lower, j.upper) for j in left] == [
        (-1.05, 1.05), (-0.724, 1.05), (0, 1.75), (-1.57, 0), (-1.75, 0), (-1.57, 0), (-1.75, 0)
    ]
    for one, other in zip(left, right):
        assert (one.lower, one.upper) == (-other.upper, -other.lower)
        assert one.grasp_torque == -other.grasp_torque and one.effort == other.effort


def test_a_g1_with_hands_drives_them_too():
    robot = load_robot("g1:15+dex3")
    assert robot == load_robot("g1+dex3") and robot.driven == DRIVEN_JOINTS + HAND_JOINTS["left"] + HAND_JOINTS["right"]
    assert g1().joints == robot.joints[:29]
    with pytest.raises(RobotError, match="dex9"):
        load_robot("g1+dex9")


def test_the_bodys_frame_leaves_the_hands_out_and_the_revision_check_too():
    names = LEFT_ARM + HAND_JOINTS["left"]
    robot = load_robot("g1+dex3").select(names)
    check_revision(robot, 15)
    frame = UnitreeFrame(robot, FrameOptions(), 15, 0.002)
    command = JointCommand(0, names, *np.ones((3, len(names))))
    assert frame.fill(command, Mode.FOLLOW)


def test_a_hands_frame_is_the_serialized_message_of_another_library():
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store, types = get_typestore(Stores.ROS2_JAZZY), {}
    hand = "unitree_hg/MotorCmd[] motor_cmd\nuint32[4] reserve"
    for name, text in (("unitree_hg/msg/MotorCmd", DEFINITIONS["unitree_hg/msg/MotorCmd"]), ("unitree_hg/msg/HandCmd", hand)):
        types.update(get_types_from_msg(text, name))
    store.register(types)
    names = (*LEFT_ARM, *reversed(HAND_JOINTS["left"][:-1]))
    frame = HandFrame(load_robot("g1+dex3").select(names), "left")
    values = np.random.default_rng(0).normal(size=(3, len(names)))
    for mode in (Mode.FOLLOW, Mode.DAMP, Mode.HOLD):
        ours = frame.fill(JointCommand(0, names, *values), mode)
        theirs = store.deserialize_cdr(ours, "unitree_hg/msg/HandCmd")
        assert bytes(store.serialize_cdr(theirs, "unitree_hg/msg/HandCmd")) == ours
        for i, (motor, joint) in enumerate(zip(theirs.motor_cmd, HAND_JOINTS["left"])):
            alive = mode is not Mode.DAMP and joint in names
            assert motor.mode == (0x10 if alive else 0x90) | i
            place = names.index(joint) if joint in names else 0
            wanted = [*values[:, place], 1.5, 0.1] if alive else [0.0] * 5
            np.testing.assert_array_equal(
                np.float32([motor.q, motor.dq, motor.tau, motor.kp, motor.kd]), np.float32(wanted)
            )


def test_a_hands_state_is_read_as_another_library_writes_it():
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store, types = get_typestore(Stores.ROS2_JAZZY), {}
    state = "unitree_hg/MotorState[] motor_state\nfloat32 power_v"  # and more that is not read
    for name, text in (("MotorState", DEFINITIONS["unitree_hg/msg/MotorState"]), ("HandState", state)):
        types.update(get_types_from_msg(text, f"unitree_hg/msg/{name}"))
    store.register(types)
    motor, hand = store.types["unitree_hg/msg/MotorState"], store.types["unitree_hg/msg/HandState"]
    values = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    motors = [
        motor(1, *row, np.array([30, 31], np.int16), 24.0, np.zeros(2, np.uint32), 0, np.zeros(4, np.uint32))
        for row in values
    ]
    frame = bytes(store.serialize_cdr(hand(motors, 12.0), "unitree_hg/msg/HandState"))
    read = read_hand_state(frame)
    for column, name in enumerate(("q", "dq", "ddq", "tau_est")):
        np.testing.assert_array_equal(read[name], values[:, column])
    for wrong in (frame[:100], CDR_HEADER + b"\x06" + frame[5:], b"\0\0\0\0" + frame[4:]):
        with pytest.raises(StateFrameError, match="Dex3 has 7"):
            read_hand_state(wrong)


def test_a_hand_none_of_whose_joints_is_driven_says_nothing():
    assert not HandFrame(g1().select(LEFT_ARM), "left").driven
