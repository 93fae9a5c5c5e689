"""Forward kinematics against MuJoCo's, on a chain that has everything a URDF can have."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import JOINTS

from vla_edge.evaluate.kinematics import Kinematics, KinematicsError
from vla_edge.evaluate.replay import evaluate_bag

LINK = (
    '<link name="{0}"><inertial><mass value="1"/><inertia ixx="1" ixy="0" ixz="0" iyy="1" iyz="0" izz="1"/></inertial>'
    "</link>"
)
JOINT = (
    '<joint name="{0}" type="{1}"><parent link="{2}"/><child link="{3}"/><origin xyz="{4}" rpy="{5}"/>'
    '<axis xyz="{6}"/><limit lower="-3" upper="3" effort="1" velocity="1"/></joint>'
)


@pytest.fixture
def urdf(tmp_path):
    links = ("base", "torso", "upper", "lower", "hand", "other", "slider")
    joints = (
        (JOINTS[2], "revolute", "base", "torso", "0 0 0.3", "0 0 0", "0 0 1"),
        (JOINTS[0], "revolute", "torso", "upper", "0.1 0.2 0.3", "0.3 -0.2 0.7", "0 1 0"),
        ("fixed_one", "fixed", "upper", "lower", "0.25 0 0.05", "0 0.4 0", "1 0 0"),
        (JOINTS[1], "continuous", "lower", "hand", "0.2 0.01 0", "-0.5 0.1 0", "0.6 0 0.8"),
        ("leg", "revolute", "base", "other", "0 0 -0.5", "0 0 0", "1 0 0"),
        ("rail", "prismatic", "torso", "slider", "0 -0.2 0.3", "0.2 0 0.1", "0 1 1"),
    )
    body = "".join(LINK.format(name) for name in links) + "".join(JOINT.format(*joint) for joint in joints)
    path = tmp_path / "robot.urdf"
    # MuJoCo would merge the hand's fixed parent into it, and move its origin
    compiler = '<mujoco><compiler fusestatic="false" discardvisual="false"/></mujoco>'
    path.write_text(f'<robot name="r">{compiler}{body}</robot>')
    return path


def test_positions_are_those_of_mujoco(urdf):
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_path(str(urdf))
    data = mujoco.MjData(model)
    names = (*JOINTS, "rail")
    kinematics = Kinematics(urdf, names, ("hand", "slider"))
    rng = np.random.default_rng(0)
    postures = rng.uniform(-2, 2, (20, len(names)))
    found = kinematics.positions(postures)
    assert found.shape == (20, 2, 3)
    for posture, places in zip(postures, found):
        for name, value in zip(names, posture):
            data.qpos[model.joint(name).qposadr[0]] = value
        mujoco.mj_kinematics(model, data)
        for link, place in zip(kinematics.links, places):
            np.testing.assert_allclose(place, data.body(link).xpos, atol=1e-9)


def test_the_ends_of_moved_chains_are_found(urdf):
    # the leg is not moved, the rail's end is, by the torso below it
    assert set(Kinematics(urdf, JOINTS).links) == {"hand", "slider"}


def test_errors_in_millimetres_are_distances_at_the_end_effector(urdf, make_bag, oracle):
    offset = np.array([0.0, 0.0, 0.1])
    found = evaluate_bag(make_bag(), oracle(offset=offset), oracle(), urdf=str(urdf), links=("hand",))
    kinematics = Kinematics(urdf, JOINTS, ("hand",))
    postures = np.random.default_rng(1).uniform(-0.3, 0.3, (2000, 3)) * np.array([1.0, 0.5, 0.0])
    apart = np.linalg.norm(kinematics.positions(postures + offset) - kinematics.positions(postures), axis=-1).mean()
    assert found.effectors["hand"].compression == pytest.approx(1e3 * apart, rel=0.05)
    assert found.effectors["hand"].action == pytest.approx(found.effectors["hand"].compression, rel=0.05)
    interval = found.effectors["hand"].interval
    assert interval.low <= found.effectors["hand"].action <= interval.high
    assert len(found.effectors["hand"].per_step) == 16


def test_what_a_urdf_lacks_is_named(urdf, tmp_path):
    with pytest.raises(KinematicsError, match="no joint nose_joint"):
        Kinematics(urdf, (*JOINTS, "nose_joint"))
    with pytest.raises(KinematicsError, match="no link paw; its ends are hand, other, slider"):
        Kinematics(urdf, JOINTS, ("paw",))
    (tmp_path / "broken.urdf").write_text("<robot><joint>")
    for name in ("broken.urdf", "absent.urdf"):
        with pytest.raises(KinematicsError, match="cannot be read"):
            Kinematics(tmp_path / name, JOINTS)
