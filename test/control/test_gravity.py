"""Torque against gravity is that of the textbook, is led in, and never exceeds a joint's limit."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from vla_edge.control.config import ControlConfig
from vla_edge.control.gravity import GravityError, load_gravity
from vla_edge.control.kernel import ControlKernel
from vla_edge.robots.robot import Joint, Robot, RobotError
from vla_edge.types import JointState

# A double pendulum: 2 kg at 0.3 m and 1 kg at 0.5 m on links of 0.4 m, turning about y, hanging down at zero.
URDF = """<robot name="double">
  <link name="base"/>
  <link name="upper"><inertial><origin xyz="0 0 -0.3"/><mass value="2"/>
    <inertia ixx="0.01" iyy="0.01" izz="0.01" ixy="0" ixz="0" iyz="0"/></inertial></link>
  <link name="lower"><inertial><origin xyz="0 0 -0.5"/><mass value="1"/>
    <inertia ixx="0.01" iyy="0.01" izz="0.01" ixy="0" ixz="0" iyz="0"/></inertial></link>
  <joint name="shoulder" type="revolute"><parent link="base"/><child link="upper"/><axis xyz="0 1 0"/>
    <limit lower="-3" upper="3" effort="10" velocity="5"/></joint>
  <joint name="elbow" type="revolute"><parent link="upper"/><child link="lower"/><origin xyz="0 0 -0.4"/>
    <axis xyz="0 1 0"/><limit lower="-3" upper="3" effort="10" velocity="5"/></joint>
</robot>"""
NAMES = ("shoulder", "elbow")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "double.urdf"
    path.write_text(URDF)
    return path


def textbook(q):
    """(2,) N.m."""
    g = 9.81
    elbow = g * 1.0 * 0.5 * np.sin(q[0] + q[1])
    return np.array([g * (2.0 * 0.3 + 1.0 * 0.4) * np.sin(q[0]) + elbow, elbow])


@pytest.mark.parametrize("library", ["mujoco", pytest.param("pinocchio", marks=pytest.mark.peers)])
def test_torques_are_the_textbooks_by_either_library(path, library, monkeypatch):
    pytest.importorskip(library)
    import vla_edge.control.gravity as gravity

    reader = {"mujoco": gravity.MujocoGravity, "pinocchio": gravity.PinocchioGravity}[library]
    model = reader(path, NAMES)
    for q in np.random.default_rng(0).uniform(-2, 2, (20, 2)):
        np.testing.assert_allclose(model.torque(q), textbook(q), atol=1e-9)
    backwards = reader(path, NAMES[::-1])
    np.testing.assert_allclose(backwards.torque(np.array([0.3, 0.7])), textbook([0.7, 0.3])[::-1], atol=1e-9)


class Textbook:
    def torque(self, position):
        return textbook(position)


def robot(effort=10.0):
    return Robot("double", tuple(Joint(name, -3.0, 3.0, 2.0, 20.0, effort) for name in NAMES))


def test_the_torque_is_led_in_with_the_start_ramp_and_kept_within_the_limits():
    kernel = ControlKernel(robot(), NAMES, ControlConfig(start_ramp=1.0, torque_scale=0.8), gravity=Textbook())
    now, posture = 10**9, np.array([1.5, 0.1])
    assert textbook(posture)[0] > 10.0
    state = JointState(now, NAMES, posture)
    kernel.rearm(state, now)
    efforts = []
    for _ in range(1500):
        now += 1_000_000
        kernel.update_joints(JointState(now, NAMES, posture), now)
        efforts.append(kernel.tick(now).effort)
    efforts = np.array(efforts)
    assert np.abs(efforts[0]).max() < 0.01
    assert np.abs(np.diff(efforts, axis=0)).max() < 0.05
    assert np.abs(efforts).max() <= 8.0 and efforts[-1, 0] == 8.0
    assert efforts[-1, 1] == pytest.approx(textbook(posture)[1])


def test_a_model_that_says_nonsense_feeds_nothing_forward():
    class Broken:
        def torque(self, position):
            return np.array([np.nan, np.inf])

    kernel = ControlKernel(robot(), NAMES, ControlConfig(start_ramp=0.0), gravity=Broken())
    kernel.rearm(JointState(10**9, NAMES, np.zeros(2)), 10**9)
    assert kernel.tick(10**9 + 1_000_000).effort.tolist() == [0.0, 0.0]


def test_gravity_for_joints_without_torque_limits_is_refused():
    with pytest.raises(RobotError, match="shoulder.*torque limit"):
        ControlKernel(replace(robot(0.0)), NAMES, gravity=Textbook())


def test_what_cannot_be_read_is_refused(path, tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    with pytest.raises(GravityError, match="does not exist"):
        load_gravity(tmp_path / "none.urdf", NAMES)
    with pytest.raises(GravityError, match="tail"):
        load_gravity(path, ("shoulder", "tail"))
    (tmp_path / "broken.xml").write_text("<mujoco><body/>")
    with pytest.raises(GravityError, match="cannot be read"):
        load_gravity(tmp_path / "broken.xml", NAMES)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GravityError, match="needs pinocchio or mujoco"):
        load_gravity(path, NAMES)


def test_without_a_model_no_library_is_imported():
    import subprocess

    code = "import sys; import vla_edge.control.worker; print({'mujoco', 'pinocchio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
