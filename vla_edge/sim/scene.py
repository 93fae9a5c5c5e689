"""The MuJoCo model of the tabletop: a G1 with fixed pelvis, a table, objects, two cameras."""

from __future__ import annotations

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.assets import g1_model_path, thinned_mesh
from vla_edge.sim.episode import BALL_RADIUS, CUBE_HALF, OBJECTS, TABLE_TOP

TIMESTEP = 0.002
"""s: physics at 500 Hz."""
MAX_WIDTH, MAX_HEIGHT = 1280, 960
"""Largest picture that can be drawn."""

# Geom groups: the head camera draws the first two, the overview all four.
GROUP_SCENE, GROUP_ARMS, GROUP_BODY, GROUP_HIDDEN = 0, 1, 2, 4

RGBA = {
    "red": (0.85, 0.06, 0.06, 1),
    "green": (0.05, 0.60, 0.12, 1),
    "blue": (0.08, 0.16, 0.90, 1),
    "yellow": (0.95, 0.82, 0.05, 1),
    "orange": (0.95, 0.42, 0.03, 1),
    "purple": (0.48, 0.10, 0.70, 1),
}

# kp N.m/rad, kd N.m.s/rad. Stiffness as LeRobot drives a G1 (arms 50-80, waist 250), wrists 40; damping raised to
# about 0.7 of critical for the inertia each joint carries here, since the model has less friction than the gears.
_GAINS = {
    "shoulder_pitch": (100.0, 6.0),
    "shoulder_roll": (100.0, 6.0),
    "shoulder_yaw": (80.0, 3.0),
    "elbow": (80.0, 3.0),
    "wrist_roll": (40.0, 1.2),
    "wrist_pitch": (40.0, 1.2),
    "wrist_yaw": (40.0, 1.0),
    "waist_yaw": (250.0, 20.0),
}
_FRICTION = 0.1
HAND_GEOMS = ("palm", "index", "middle")
FINGERTIP_OFFSET = (0.205, 0.0, 0.0)
"""m, in the wrist yaw link: between the tips of index and middle finger."""


def gains() -> tuple[np.ndarray, np.ndarray]:
    """(15,) kp and (15,) kd of the servos, in the order of DRIVEN_JOINTS."""
    keys = [name.removesuffix("_joint").removeprefix("left_").removeprefix("right_") for name in DRIVEN_JOINTS]
    return np.array([_GAINS[key][0] for key in keys]), np.array([_GAINS[key][1] for key in keys])


def build_model(tier: str):
    """The compiled model of a tier: objects are mocap bodies for "touch", free bodies for "hard".

    Its joints are the 15 driven ones, in that order in `ctrl`, followed by the objects' free joints.

    Raises:
        AssetError: the robot's model is not installed.
    """
    import mujoco

    path = g1_model_path()
    spec = mujoco.MjSpec.from_file(str(path))
    _keep_upper_body(spec)
    _thin_meshes(spec, path.parent / "assets")
    _add_servos(spec)
    _add_hands(spec)
    _add_table(spec)
    for index in range(OBJECTS[tier]):
        _add_object(spec, index, mocap=tier == "touch")
    _add_cameras(spec)
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    visual = spec.visual
    visual.quality.offsamples = 0
    visual.quality.shadowsize = 0
    getattr(visual, "global").offwidth = MAX_WIDTH
    getattr(visual, "global").offheight = MAX_HEIGHT
    visual.headlight.ambient = (0.42, 0.42, 0.42)
    visual.headlight.diffuse = (0.28, 0.28, 0.28)
    visual.headlight.specular = (0.0, 0.0, 0.0)
    visual.map.znear = 0.01
    return spec.compile()


def _keep_upper_body(spec) -> None:
    for key in list(spec.keys):
        spec.delete(key)
    for sensor in list(spec.sensors):
        spec.delete(sensor)
    for actuator in list(spec.actuators):
        spec.delete(actuator)
    for joint in list(spec.joints):
        if joint.name not in DRIVEN_JOINTS:
            spec.delete(joint)
    for geom in list(spec.geoms):
        if geom.classname.name in ("collision", "foot"):
            spec.delete(geom)
            continue
        arm = any(part in geom.parent.name for part in ("elbow", "wrist", "hand"))
        geom.group = GROUP_ARMS if arm else GROUP_BODY
        if "hand" in geom.meshname:
            geom.material = "black"
    for side, sign in (("left", 1.0), ("right", -1.0)):
        # The fingers are not driven; the thumb lies folded along the palm, out of the picture's middle.
        spec.body(f"{side}_hand_thumb_1_link").quat = (np.cos(0.45), 0, 0, sign * np.sin(0.45))
    for body in spec.bodies:
        body.gravcomp = 1.0
    for light in list(spec.lights):
        spec.delete(light)


def _thin_meshes(spec, directory) -> None:
    for mesh in spec.meshes:
        # The head camera draws hands and forearms all the time; the trunk is only in the overview, large and in front.
        trunk = any(part in mesh.file for part in ("torso", "head", "logo", "shoulder", "pelvis"))
        vertices, triangles = thinned_mesh(directory / mesh.file, 1500 if trunk else 300)
        name = mesh.name or mesh.file.rsplit(".", 1)[0]
        mesh.name, mesh.file = name, ""
        mesh.uservert, mesh.userface = vertices.ravel(), triangles.ravel()


def _add_servos(spec) -> None:
    import mujoco

    for name, kp, kd in zip(DRIVEN_JOINTS, *gains()):
        spec.joint(name).frictionloss = _FRICTION
        servo = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        servo.set_to_position(kp=kp, kv=kd)
        servo.ctrllimited = False


def _add_hands(spec) -> None:
    """Simple bodies for contact, and the fingertip sites that tasks are judged by."""
    import mujoco

    for side, sign in (("left", 1.0), ("right", -1.0)):
        wrist = spec.body(f"{side}_wrist_yaw_link")
        wrist.add_site(name=f"{side}_fingertip", pos=FINGERTIP_OFFSET, group=GROUP_HIDDEN)
        common = {"group": GROUP_HIDDEN, "contype": 1, "conaffinity": 2, "density": 0.0, "rgba": (1, 0, 1, 0.3)}
        wrist.add_geom(
            name=f"{side}_palm",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=(0.085, 0.003 * sign, 0.0),
            size=(0.04, 0.02, 0.04),
            **common,
        )
        for finger, z in (("index", 0.0285), ("middle", -0.0285)):
            wrist.add_geom(
                name=f"{side}_{finger}",
                type=mujoco.mjtGeom.mjGEOM_CAPSULE,
                fromto=(0.12, 0.0046 * sign, z, 0.2, 0.0046 * sign, z),
                size=(0.011, 0, 0),
                **common,
            )


def _add_table(spec) -> None:
    import mujoco

    world = spec.worldbody
    world.add_light(pos=(0.5, 0.8, 2.2), dir=(-0.1, -0.6, -1.4), type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
                    diffuse=(0.45, 0.45, 0.45), specular=(0.5, 0.5, 0.5), ambient=(0, 0, 0), castshadow=False)
    world.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        pos=(0.47, 0, TABLE_TOP - 0.02),
        size=(0.24, 0.45, 0.02),
        rgba=(0.80, 0.78, 0.74, 1),
        group=GROUP_SCENE,
        contype=2,
        conaffinity=3,
        friction=(0.6, 0.005, 0.0001),
    )
    world.add_geom(
        name="floor",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=(3, 3, 0.1),
        rgba=(0.32, 0.34, 0.38, 1),
        group=GROUP_SCENE,
        contype=0,
        conaffinity=0,
    )


def _add_object(spec, index: int, mocap: bool) -> None:
    """One body that can be dressed as a cube or a ball (`World.reset` shows the one and hides the other)."""
    import mujoco

    body = spec.worldbody.add_body(name=f"object{index}", mocap=mocap, pos=(0.45, 0.1 * index - 0.3, TABLE_TOP + 0.05))
    if not mocap:
        body.add_freejoint(name=f"object{index}_free")
        body.mass, body.ipos = 0.08, (0.0, 0.0, 0.0)
        body.inertia = (0.08 * 0.06**2 / 6,) * 3
        body.explicitinertial = True
    # Rolling friction lets a ball lie where it is put and stop soon after it is pushed, as a soft one would.
    common = {"group": GROUP_SCENE, "contype": 2, "conaffinity": 3, "density": 0.0}
    common |= {"condim": 6, "friction": (0.6, 0.02, 0.003)}
    spec.add_material(name=f"object{index}", specular=0.6, shininess=0.5, rgba=(1, 1, 1, 1))
    body.add_geom(
        name=f"object{index}_cube", type=mujoco.mjtGeom.mjGEOM_BOX, size=(CUBE_HALF,) * 3, material=f"object{index}",
        **common,
    )
    body.add_geom(
        name=f"object{index}_ball", type=mujoco.mjtGeom.mjGEOM_SPHERE, size=(BALL_RADIUS, 0, 0),
        material=f"object{index}", **common,
    )


def _add_cameras(spec) -> None:
    """`head`, fixed to the torso above the chest and looking at the table; `overview`, in front of the robot."""
    import mujoco

    spec.add_texture(
        name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=(0.80, 0.86, 0.93), rgb2=(0.45, 0.50, 0.58), width=256, height=1536,
    )
    pitch = np.deg2rad(62.0)
    # A MuJoCo camera looks along its -z with +y up: x axis to the robot's right, y axis ahead and up.
    spec.body("torso_link").add_camera(
        name="head", pos=(0.07, 0.0, 0.44), fovy=52.0, quat=_orientation((0, -1, 0), (np.sin(pitch), 0, np.cos(pitch)))
    )
    forward = np.array((0.28, 0, 0.85)) - np.array((1.45, -0.85, 1.45))
    right = np.cross(forward, (0, 0, 1.0))
    up = np.cross(right, forward)
    spec.worldbody.add_camera(
        name="overview", pos=(1.45, -0.85, 1.45), fovy=42.0,
        quat=_orientation(right / np.linalg.norm(right), up / np.linalg.norm(up)),
    )


def _orientation(x, y) -> np.ndarray:
    """(4,) quaternion of the frame with these x and y axes."""
    import mujoco

    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.column_stack((x, y, np.cross(x, y))).ravel())
    return quat
