"""Robots come from YAML or a URDF, and a description that cannot be right is refused by name."""

import math

import numpy as np
import pytest

from vla_edge.robots.g1 import g1
from vla_edge.robots.robot import Joint, Robot, RobotError, load_robot

URDF = """<robot name="two">
  <joint name="base" type="fixed"/>
  <joint name="lift" type="prismatic"><limit lower="0.1" upper="0.8" effort="50" velocity="0.5"/></joint>
  <joint name="elbow" type="revolute"><limit lower="-1" upper="2" effort="25" velocity="37"/></joint>
  <joint name="wheel" type="continuous"/>
  <joint name="finger" type="revolute">
    <limit lower="0" upper="1" effort="1" velocity="1"/><mimic joint="elbow"/>
  </joint>
</robot>"""


def joint(**changes):
    return Joint(**{**dict(name="a", lower=-1.0, upper=1.0, velocity=2.0, acceleration=20.0), **changes})


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(lower=1.0), "not below"),
        (dict(velocity=0.0), "above zero"),
        (dict(acceleration=-1.0), "above zero"),
        (dict(lower=math.nan), "finite"),
        (dict(upper="wide"), "finite"),
        (dict(home=2.0), "home"),
        (dict(kp=-1.0), "negative"),
        (dict(hardware_velocity=1.0), "exceeds"),
        (dict(name=""), "name"),
    ],
)
def test_an_impossible_joint_is_refused(changes, says):
    with pytest.raises(RobotError, match=says):
        joint(**changes)


def test_a_joint_named_twice_is_refused():
    with pytest.raises(RobotError, match="a twice"):
        Robot("r", (joint(), joint()))
    with pytest.raises(RobotError, match="twice"):
        Robot("r", (joint(), joint(name="b"))).select(("a", "a"))


def test_an_unknown_joint_is_named_with_the_nearest():
    robot = Robot("r", (joint(name="left_elbow_joint"), joint(name="left_knee_joint")))
    with pytest.raises(RobotError, match="left_elbow_joint"):
        robot.joint("left_elbow")


def test_columns_follow_the_selection_and_are_read_only():
    robot = Robot("r", (joint(name="a", home=0.1), joint(name="b", home=0.2), joint(name="c", home=0.3)))
    np.testing.assert_array_equal(robot.select(("c", "a")).home, [0.3, 0.1])
    with pytest.raises(ValueError):
        robot.home[0] = 1.0


def test_yaml_goes_there_and_back(tmp_path):
    import yaml

    robot = Robot("r", (joint(name="a", index=3), joint(name="b", hardware_velocity=9.0)), ("b",), "notes")
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(robot.to_dict()))
    assert Robot.from_yaml(path) == robot


@pytest.mark.parametrize(
    "text, says",
    [
        ("[1, 2]", "not a robot description"),
        ("joints: [{name: a, lower: 0, upper: 1, velocity: 1}]", "lacks acceleration"),
        ("joints: [{name: a, lower: 0, upper: 1, velocity: 1, acceleration: 1, max: 3}]", "unknown keys max"),
        ("joints: []", "no joints"),
        ("joints: [3]", "not a mapping"),
        ("joints: [", "cannot be read"),
        ("driven: [b]\njoints: [{name: a, lower: 0, upper: 1, velocity: 1, acceleration: 1}]", "no joint 'b'"),
    ],
)
def test_a_yaml_that_cannot_be_right_is_refused(tmp_path, text, says):
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    with pytest.raises(RobotError, match=says):
        load_robot(str(path))


def test_a_urdf_gives_its_actuated_joints_with_working_limits():
    robot = Robot.from_urdf(URDF, velocity=3.0, acceleration=30.0)
    assert robot.name == "two"
    assert robot.joint_names == ("lift", "elbow", "wheel")
    lift, elbow, wheel = robot.joints
    assert (lift.lower, lift.upper, lift.velocity, lift.effort, lift.home) == (0.1, 0.8, 0.5, 50.0, 0.1)
    assert (elbow.velocity, elbow.hardware_velocity, elbow.acceleration) == (3.0, 37.0, 30.0)
    assert wheel.lower < -100 and wheel.upper > 100


def test_a_g1_joint_as_unitrees_urdf_writes_it_reads_like_our_table():
    limit = '<limit lower="-1.0472" upper="2.0944" effort="25" velocity="37"/>'
    robot = Robot.from_urdf(f'<robot name="g1"><joint name="e" type="revolute">{limit}</joint></robot>')
    ours, theirs = g1().joint("left_elbow_joint"), robot.joints[0]
    for attribute in ("lower", "upper", "effort", "velocity", "acceleration", "hardware_velocity"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


@pytest.mark.parametrize(
    "text, says",
    [
        ("<robot", "not XML"),
        ("<robot name='x'/>", "no revolute"),
        ("<robot><joint name='a' type='revolute'/></robot>", "no <limit>"),
        ("<robot><joint name='a' type='revolute'><limit lower='x' upper='1'/></joint></robot>", "not a number"),
        ("<robot><joint name='a' type='revolute'><limit velocity='1'/></joint></robot>", "not below"),
        ("/nowhere/robot.urdf", "cannot be read"),
    ],
)
def test_a_urdf_that_cannot_be_right_is_refused(text, says):
    with pytest.raises(RobotError, match=says):
        load_robot(text)


def test_an_unknown_robot_is_refused_with_what_may_be_given():
    with pytest.raises(RobotError, match="g1"):
        load_robot("h1")
    with pytest.raises(RobotError, match="does not exist"):
        load_robot("/nowhere/h1.yaml")


def test_limits_that_contradict_another_description_are_refused_by_joint_and_number():
    urdf = Robot.from_urdf(URDF)
    inside = Robot("r", (joint(name="elbow", lower=-0.9, upper=1.9, velocity=3.0, effort=20.0),))
    inside.check_within(urdf, "robot_description")
    for changes, says in (
        (dict(lower=-1.2), "lower limit -1.2 rad contradicts robot_description, which allows -1"),
        (dict(upper=2.5), "upper limit 2.5 rad"),
        (dict(velocity=40.0), "velocity 40 rad/s"),
        (dict(effort=30.0), "torque 30 N.m"),
        (dict(name="wrist"), "'wrist' does not exist in robot_description"),
    ):
        wrong = {**dict(name="elbow", lower=-0.9, upper=1.9, velocity=3.0, effort=20.0), **changes}
        with pytest.raises(RobotError, match=says):
            Robot("r", (joint(**wrong),)).check_within(urdf, "robot_description")


def test_jerk_is_a_hundred_times_the_acceleration_where_it_is_not_given_and_follows_it():
    assert joint().jerk == 2000.0 and joint(jerk=50.0).jerk == 50.0
    assert Robot("r", (joint(jerk=50.0),)).with_limits(acceleration=10.0).joints[0].jerk == 25.0
    with pytest.raises(RobotError, match="jerk"):
        joint(jerk=0.0)


def test_a_revision_that_is_no_number_is_refused():
    with pytest.raises(RobotError, match="revision"):
        Robot.from_dict({**Robot("r", (joint(),)).to_dict(), "revision": "five"})


def test_limits_can_be_lowered_for_all_joints_but_not_above_the_hardware():
    robot = Robot("r", (joint(hardware_velocity=5.0),))
    assert robot.with_limits(velocity=1.0).joints[0].velocity == 1.0
    assert robot.with_limits(velocity=10.0, acceleration=4.0).joints[0] == joint(
        hardware_velocity=5.0, velocity=5.0, acceleration=4.0
    )
