"""The G1's table is the maker's, and the shipped YAML is that table."""

from pathlib import Path

import numpy as np
import pytest

from vla_edge.robots.g1 import DRIVEN_JOINTS, LEFT_ARM, MODES, RIGHT_ARM, g1
from vla_edge.robots.robot import Robot, RobotError, load_robot

YAML = Path(__file__).parents[2] / "config" / "robots" / "g1.yaml"

# name, lower, upper, rad/s and N.m in mode 15, then in mode 5 where they differ: Unitree's URDFs.
TABLE = """
left_hip_pitch_joint -2.5307 2.8798 20 139 32 88
left_hip_roll_joint -0.5236 2.9671 20 139
left_hip_yaw_joint -2.7576 2.7576 32 88
left_knee_joint -0.0873 2.8798 20 139
left_ankle_pitch_joint -0.8727 0.5236 30 35
left_ankle_roll_joint -0.2618 0.2618 30 35
right_hip_pitch_joint -2.5307 2.8798 20 139 32 88
right_hip_roll_joint -2.9671 0.5236 20 139
right_hip_yaw_joint -2.7576 2.7576 32 88
right_knee_joint -0.0873 2.8798 20 139
right_ankle_pitch_joint -0.8727 0.5236 30 35
right_ankle_roll_joint -0.2618 0.2618 30 35
waist_yaw_joint -2.6180 2.6180 32 88
waist_roll_joint -0.5200 0.5200 30 35
waist_pitch_joint -0.5200 0.5200 30 35
left_shoulder_pitch_joint -3.0892 2.6704 37 25
left_shoulder_roll_joint -1.5882 2.2515 37 25
left_shoulder_yaw_joint -2.6180 2.6180 37 25
left_elbow_joint -1.0472 2.0944 37 25
left_wrist_roll_joint -1.9722 1.9722 37 25
left_wrist_pitch_joint -1.6144 1.6144 27 13.4 22 5
left_wrist_yaw_joint -1.6144 1.6144 27 13.4 22 5
right_shoulder_pitch_joint -3.0892 2.6704 37 25
right_shoulder_roll_joint -2.2515 1.5882 37 25
right_shoulder_yaw_joint -2.6180 2.6180 37 25
right_elbow_joint -1.0472 2.0944 37 25
right_wrist_roll_joint -1.9722 1.9722 37 25
right_wrist_pitch_joint -1.6144 1.6144 27 13.4 22 5
right_wrist_yaw_joint -1.6144 1.6144 27 13.4 22 5
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("mode", [15, 5])
def test_joints_limits_and_motors_are_unitrees(mode):
    robot = g1(mode)
    assert robot.joint_names == tuple(row[0] for row in ROWS)
    for index, (joint, row) in enumerate(zip(robot.joints, ROWS)):
        motor = row[5:7] if mode == 5 and len(row) > 5 else row[3:5]
        assert joint.index == index
        assert (joint.lower, joint.upper) == (float(row[1]), float(row[2]))
        assert (joint.hardware_velocity, joint.effort) == (float(motor[0]), float(motor[1]))


def test_mode_11_has_the_light_wrists_and_13_the_fast_hips():
    eleven, thirteen, fifteen = g1(11), g1(13), g1(15)
    assert (eleven.joint("left_wrist_yaw_joint").effort, eleven.joint("left_hip_pitch_joint").effort) == (5.0, 139.0)
    assert thirteen.joint("left_wrist_yaw_joint").effort == 13.4
    assert thirteen.joint("left_hip_pitch_joint").effort == 88.0
    assert thirteen.joint("left_hip_pitch_joint").hardware_velocity == 32.0
    assert fifteen.joint("left_elbow_joint") == eleven.joint("left_elbow_joint")


@pytest.mark.parametrize("locked, like", [(12, 11), (14, 13), (16, 15)])
def test_even_modes_lock_the_waist_and_keep_the_motor_indices(locked, like):
    robot, other = g1(locked), g1(like)
    assert set(other.joint_names) - set(robot.joint_names) == {"waist_roll_joint", "waist_pitch_joint"}
    assert robot.joints == tuple(other.joint(name) for name in robot.joint_names)
    assert robot.joint("left_shoulder_pitch_joint").index == 15


@pytest.mark.parametrize("mode", MODES)
def test_working_limits_are_far_below_the_hardware(mode):
    for joint in g1(mode).joints:
        assert joint.velocity <= 0.2 * joint.hardware_velocity
        assert joint.lower < joint.home < joint.upper


def test_the_driven_joints_are_both_arms_and_the_waist_yaw_in_the_agreed_order():
    assert len(DRIVEN_JOINTS) == 15
    assert DRIVEN_JOINTS == LEFT_ARM + RIGHT_ARM + ("waist_yaw_joint",)
    assert DRIVEN_JOINTS[0] == "left_shoulder_pitch_joint" and DRIVEN_JOINTS[6] == "left_wrist_yaw_joint"
    assert g1().driven == DRIVEN_JOINTS
    assert g1().select(DRIVEN_JOINTS).joint_names == DRIVEN_JOINTS


def test_the_shipped_yaml_is_the_table():
    assert Robot.from_yaml(YAML) == g1()
    assert load_robot(str(YAML)) == load_robot("g1") == load_robot("g1:15")


@pytest.mark.parametrize("mode", [0, 6, 17, "x", None, "15.5"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(RobotError, match="mode"):
        g1(mode)


def test_left_and_right_mirror_each_other():
    robot = g1()
    for left, right in zip(LEFT_ARM, RIGHT_ARM):
        one, other = robot.joint(left), robot.joint(right)
        if "shoulder_roll" in left:
            assert (one.lower, one.upper) == (-other.upper, -other.lower)
        else:
            assert (one.lower, one.upper) == (other.lower, other.upper)
        np.testing.assert_equal(one.effort, other.effort)
