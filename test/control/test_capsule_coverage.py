"""The G1's capsules hold what they stand for: the surface of its links, as MuJoCo Menagerie's meshes have it."""

import numpy as np
import pytest
from test_capsules import YAML

from vla_edge.control.capsules import CapsuleModel
from vla_edge.control.config import ControlConfig
from vla_edge.robots.dex3 import HAND_JOINTS
from vla_edge.robots.g1 import DRIVEN_JOINTS, g1
from vla_edge.sim.assets import AssetError, g1_model_path

NOT_HELD = ("knee", "ankle")
"""Links below the thighs, which no hand reaches."""
POSTURES, POINTS_PER_M2 = 8, 20_000


@pytest.fixture(scope="module")
def robot():
    """(mujoco, model, link -> (N, 3) points spread evenly over its surface, in its own frame)."""
    mujoco = pytest.importorskip("mujoco")
    try:
        model = mujoco.MjModel.from_xml_path(str(g1_model_path()))
    except AssetError as error:
        pytest.skip(str(error))
    rng, points = np.random.default_rng(0), {}
    for geom in range(model.ngeom):
        seen = not model.geom_contype[geom] and not model.geom_conaffinity[geom]
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH and seen:
            turn = np.zeros(9)
            mujoco.mju_quat2Mat(turn, model.geom_quat[geom])
            spread = surface(model, model.geom_dataid[geom], rng) @ turn.reshape(3, 3).T + model.geom_pos[geom]
            points.setdefault(model.body(model.geom_bodyid[geom]).name, []).append(spread)
    return mujoco, model, {link: np.vstack(parts) for link, parts in points.items()}


def surface(model, mesh: int, rng) -> np.ndarray:
    """(N, 3) m, uniform over the area of a mesh."""
    begin, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    first, faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    corners = model.mesh_vert[begin : begin + count][model.mesh_face[first : first + faces]]
    area = 0.5 * np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    chosen = corners[rng.choice(faces, max(200, int(area.sum() * POINTS_PER_M2)), p=area / area.sum())]
    u, v = np.sqrt(rng.random((len(chosen), 1))), rng.random((len(chosen), 1))
    return (1 - u) * chosen[:, 0] + u * (1 - v) * chosen[:, 1] + u * v * chosen[:, 2]


def outside(robot, capsules: CapsuleModel, radius: np.ndarray, posture: np.ndarray, fingers=None) -> dict:
    """Link -> (N,) m from its points to the nearest capsule's surface, negative inside.

    Args:
        fingers: joint -> rad, for those that are not driven.
    """
    mujoco, model, points = robot
    data = mujoco.MjData(model)
    for name, angle in (dict(zip(DRIVEN_JOINTS, posture)) | (fingers or {})).items():
        data.qpos[model.joint(name).qposadr[0]] = angle
    mujoco.mj_kinematics(model, data)
    root = model.body("pelvis").id
    begin, end = capsules.ends(posture[None])[0].transpose(2, 0, 1)
    along, found = end - begin, {}
    for link, spread in points.items():
        body = model.body(link).id
        world = spread @ data.xmat[body].reshape(3, 3).T + data.xpos[body]
        apart = ((world - data.xpos[root]) @ data.xmat[root].reshape(3, 3))[:, None] - begin
        share = np.clip((apart * along).sum(-1) / np.maximum((along * along).sum(-1), 1e-12), 0.0, 1.0)
        found[link] = (np.linalg.norm(apart - share[..., None] * along, axis=-1) - radius).min(axis=1)
    return found


@pytest.fixture(scope="module")
def held():
    """(capsules, (C,) their radii)."""
    import yaml

    rows = yaml.safe_load(YAML.read_text())["capsules"]
    return CapsuleModel.from_yaml(YAML, DRIVEN_JOINTS), np.array([row["radius"] for row in rows])


def test_the_links_of_the_g1_lie_in_its_capsules_whatever_its_posture(robot, held):
    table = g1().select(DRIVEN_JOINTS)
    drawn = np.random.default_rng(1).uniform(table.column("lower"), table.column("upper"), (POSTURES, 15))
    inside, worst = {}, {}
    for posture in np.vstack([np.zeros(15), drawn]):
        for link, gap in outside(robot, *held, posture).items():
            inside[link] = min(inside.get(link, 1.0), float(np.mean(gap <= 0.0)))
            worst[link] = max(worst.get(link, -1.0), float(gap.max()))
    links = [link for link in inside if not any(part in link for part in NOT_HELD)]
    assert len(links) > 35
    for link in links:
        print(f"{link:30} {100 * inside[link]:5.1f} % inside, furthest out {1e3 * worst[link]:5.1f} mm")
    stop = ControlConfig().collision_stop
    assert {link: inside[link] for link in links if inside[link] < 0.95} == {}
    # So that a robot which stands at that distance does not touch itself.
    assert {link: worst[link] for link in links if worst[link] > 0.8 * stop} == {}


def test_curled_fingers_reach_out_of_the_hands_capsules_by_what_is_said_of_them(robot, held):
    model, rng, furthest = robot[1], np.random.default_rng(2), 0.0
    fingers = {name: model.joint(name).range for name in HAND_JOINTS["left"] + HAND_JOINTS["right"]}
    for _ in range(40):
        drawn = {name: rng.uniform(*limits) for name, limits in fingers.items()}
        gaps = outside(robot, *held, np.zeros(15), drawn)
        furthest = max(furthest, *(gap.max() for link, gap in gaps.items() if "hand" in link))
    assert 0.03 < furthest < 0.045
