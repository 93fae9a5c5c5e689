"""Distances between capsules are MuJoCo's, and a hand that would strike the body stops before it."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from rig import Rig

from vla_edge.control.capsules import CapsuleError, CapsuleModel
from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlError
from vla_edge.control.screening import RejectedChunk
from vla_edge.robots.g1 import DRIVEN_JOINTS, g1
from vla_edge.robots.robot import load_robot

YAML = Path(__file__).parents[2] / "config" / "robots" / "g1_capsules.yaml"
DATA = yaml.safe_load(YAML.read_text())


@pytest.fixture(scope="module")
def model():
    return CapsuleModel.from_yaml(YAML, DRIVEN_JOINTS)


def in_mujoco(data):
    """The same tree and capsules as a MuJoCo model."""
    mujoco = pytest.importorskip("mujoco")
    spec = mujoco.MjSpec()
    bodies = {}
    for row in data["bodies"]:
        parent = bodies[row["parent"]] if row.get("parent") else spec.worldbody
        body = parent.add_body(name=row["name"], pos=row.get("position", [0, 0, 0]),
                               quat=row.get("rotation", [1, 0, 0, 0]), mass=1.0, inertia=[0.01, 0.01, 0.01])
        if row.get("joint"):
            body.add_joint(name=row["joint"], type=mujoco.mjtJoint.mjJNT_HINGE, axis=row["axis"])
        bodies[row["name"]] = body
    for row in data["capsules"]:
        bodies[row["body"]].add_geom(name=row["name"], type=mujoco.mjtGeom.mjGEOM_CAPSULE,
                                     fromto=[*row["from"], *row["to"]], size=[row["radius"], 0, 0])
    return mujoco, spec.compile()


def test_distances_are_mujocos(model):
    mujoco, reference = in_mujoco(DATA)
    state = mujoco.MjData(reference)
    robot = g1().select(DRIVEN_JOINTS)
    postures = np.random.default_rng(0).uniform(robot.column("lower"), robot.column("upper"), (40, 15))
    ours = model.distances(postures)
    for posture, distances in zip(postures, ours):
        for name, angle in zip(DRIVEN_JOINTS, posture):
            state.qpos[reference.joint(name).qposadr[0]] = angle
        mujoco.mj_forward(reference, state)
        for pair, distance in zip(model.pairs, distances):
            theirs = mujoco.mj_geomDistance(reference, state, *(reference.geom(n).id for n in pair), 5.0, None)
            assert distance == pytest.approx(theirs, abs=1e-6), pair


def test_the_g1s_parts_are_apart_when_it_stands_and_neighbours_are_not_watched(model):
    distances = dict(zip(model.pairs, model.distances(np.zeros((1, 15)))[0]))
    assert min(distances.values()) > 0.01
    assert ("left_torso", "left_hand") in distances and ("left_hand", "right_hand") in distances
    assert ("left_torso", "left_upper_arm") not in distances and ("left_forearm", "left_wrist") not in distances
    assert ("left_thigh", "right_thigh") not in distances  # no driven joint moves one against the other


def test_the_order_of_joints_does_not_matter(model):
    order = np.random.default_rng(1).permutation(15)
    other = CapsuleModel.from_yaml(YAML, tuple(DRIVEN_JOINTS[i] for i in order))
    posture = np.random.default_rng(2).normal(0, 0.5, (1, 15))
    np.testing.assert_allclose(other.distances(posture[:, order]), model.distances(posture), atol=1e-12)


def test_fingers_are_not_followed_and_change_nothing(model):
    names = load_robot("g1+dex3").driven
    posture = np.random.default_rng(3).normal(0, 0.3, (1, len(names)))
    with_hands = CapsuleModel.from_yaml(YAML, names)
    np.testing.assert_allclose(with_hands.distances(posture), model.distances(posture[:, :15]), atol=1e-12)


@pytest.mark.parametrize(
    "data, says",
    [
        ([], "needs lists"),
        ({"bodies": [{"name": "a", "colour": 3}], "capsules": []}, "may have"),
        ({"bodies": [{"name": "a", "parent": "b"}], "capsules": []}, "not listed before"),
        ({"bodies": [{"name": "a", "axis": [0, 0, 0]}], "capsules": []}, "not all zero"),
        ({"bodies": [{"name": "a"}], "capsules": []}, "no body moved by joint"),
        ({**DATA, "capsules": [{**DATA["capsules"][0], "body": "tail"}]}, "tail"),
        ({**DATA, "capsules": [{"name": "x", "body": "pelvis"}]}, "lacks from, radius, to"),
        ({**DATA, "capsules": DATA["capsules"][:1]}, "nothing could be watched"),
    ],
)
def test_a_model_that_contradicts_itself_or_the_robot_is_refused(data, says):
    with pytest.raises(CapsuleError, match=says):
        CapsuleModel(data, DRIVEN_JOINTS)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CapsuleError, match="cannot be read"):
        CapsuleModel.from_yaml(tmp_path / "none.yaml", DRIVEN_JOINTS)


# In the kernel ------------------------------------------------------------------------------------------------------


def across(rig, model, target, every=0.2, seconds=4.0):
    """Chunks that lead from where the robot is to `target` and no further, again and again."""
    nearest = []
    for _ in range(round(seconds / every)):
        ramp = np.minimum(np.arange(1, 33) * 0.05 / 1.5, 1.0)[:, None]
        try:
            rig.send(rig.measured + (target - rig.measured) * ramp, age=0.0)
        except RejectedChunk:
            pass
        rig.run(every)
        nearest.append(model.distances(rig.path[-round(every * 1000) :: 20]).min())
    return min(nearest)


def test_a_hand_sent_into_the_other_arm_stops_before_it(model):
    inward = np.zeros(15)
    inward[[1, 2, 3]] = 0.0, -1.2, 0.5  # left arm before the chest
    inward[[8, 9, 10]] = 0.0, 1.2, 0.5
    assert model.distances(inward[None]).min() < 0.0
    free = Rig(ControlConfig(start_ramp=0.0))
    assert across(free, model, inward) < 0.0  # without the model they strike
    rig = Rig(ControlConfig(start_ramp=0.0), capsules=model)
    assert across(rig, model, inward) > 0.005
    rig.judge()
    assert rig.kernel.counters.near_collisions > 0
    # Apart is always possible.
    apart = np.zeros(15)
    apart[[1, 8]] = 0.4, -0.4
    across(rig, model, apart)
    rig.judge()
    np.testing.assert_allclose(rig.path[-1], apart, atol=0.03)
    assert rig.kernel.nearest > 0.05


def test_an_operator_cannot_push_the_hands_together_either_and_can_part_them(model):
    inward = np.zeros(15)
    inward[[2, 3, 9, 10]] = -1.2, 0.5, 1.2, 0.5
    rig = Rig(ControlConfig(start_ramp=0.0, max_first_step=7.0), capsules=model)
    for target, parted in ((inward, False), (np.eye(15)[1] * 0.5 - np.eye(15)[8] * 0.5, True)):
        for _ in range(150):
            try:
                rig.kernel.operate(target, rig.now)
            except ControlError as error:
                assert "closer" in str(error) and not parted
            rig.run(0.02)
        rig.judge()
        assert model.distances(rig.path[::10]).min() > 0.003
    np.testing.assert_allclose(rig.path[-1], target, atol=0.02)


def test_far_from_itself_the_robot_moves_as_without_a_model(model):
    apart = np.zeros(15)
    apart[[1, 8]] = 0.4, -0.4
    rigs = [Rig(ControlConfig(start_ramp=0.0), start=apart, capsules=capsules) for capsules in (model, None)]
    for rig in rigs:
        rig.send(np.tile(apart + 0.05, (32, 1)))
        rig.run(0.5)
    assert rigs[0].path.tobytes() == rigs[1].path.tobytes()
