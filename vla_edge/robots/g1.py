"""The Unitree G1 with 29 joints, by hardware mode.

Position limits, velocities and torques: unitree_ros/robots/g1_description/*.urdf and its README. Gains: Unitree's
low-level and arm_sdk examples, which hold an unloaded arm gently. Working velocity and acceleration are ours and far
below the hardware's 20-37 rad/s: NVIDIA drives these arms at no more than 6 rad/s, others at 1.5.
"""

from __future__ import annotations

from vla_edge.robots.robot import Joint, Robot, RobotError

MODES = (5, 11, 12, 13, 14, 15, 16)
DEFAULT_MODE = 15

WORKING_VELOCITY = 3.0
"""rad/s, default working limit of every joint."""
WORKING_ACCELERATION = 30.0
"""rad/s^2: from rest to the working velocity in 0.1 s."""

_ARM = ("shoulder_pitch", "shoulder_roll", "shoulder_yaw", "elbow", "wrist_roll", "wrist_pitch", "wrist_yaw")
LEFT_ARM = tuple(f"left_{part}_joint" for part in _ARM)
RIGHT_ARM = tuple(f"right_{part}_joint" for part in _ARM)
DRIVEN_JOINTS = LEFT_ARM + RIGHT_ARM + ("waist_yaw_joint",)
"""The upper body the shipped policy moves; the legs belong to the balance controller."""

# (lower, upper) rad, (rad/s, N.m) in mode 15, (kp, kd); in motor index order
_LEG_AND_WAIST = (
    ("left_hip_pitch_joint", -2.5307, 2.8798, 20, 139, 60, 1),
    ("left_hip_roll_joint", -0.5236, 2.9671, 20, 139, 60, 1),
    ("left_hip_yaw_joint", -2.7576, 2.7576, 32, 88, 60, 1),
    ("left_knee_joint", -0.0873, 2.8798, 20, 139, 100, 2),
    ("left_ankle_pitch_joint", -0.8727, 0.5236, 30, 35, 40, 1),
    ("left_ankle_roll_joint", -0.2618, 0.2618, 30, 35, 40, 1),
    ("right_hip_pitch_joint", -2.5307, 2.8798, 20, 139, 60, 1),
    ("right_hip_roll_joint", -2.9671, 0.5236, 20, 139, 60, 1),
    ("right_hip_yaw_joint", -2.7576, 2.7576, 32, 88, 60, 1),
    ("right_knee_joint", -0.0873, 2.8798, 20, 139, 100, 2),
    ("right_ankle_pitch_joint", -0.8727, 0.5236, 30, 35, 40, 1),
    ("right_ankle_roll_joint", -0.2618, 0.2618, 30, 35, 40, 1),
    ("waist_yaw_joint", -2.6180, 2.6180, 32, 88, 60, 1.5),
    ("waist_roll_joint", -0.5200, 0.5200, 30, 35, 60, 1.5),
    ("waist_pitch_joint", -0.5200, 0.5200, 30, 35, 60, 1.5),
)
_ARM_LIMITS = (
    ("shoulder_pitch", -3.0892, 2.6704, 37, 25),
    ("shoulder_roll", -1.5882, 2.2515, 37, 25),
    ("shoulder_yaw", -2.6180, 2.6180, 37, 25),
    ("elbow", -1.0472, 2.0944, 37, 25),
    ("wrist_roll", -1.9722, 1.9722, 37, 25),
    ("wrist_pitch", -1.6144, 1.6144, 27, 13.4),
    ("wrist_yaw", -1.6144, 1.6144, 27, 13.4),
)
ARM_KP, ARM_KD = 60.0, 1.5


def _motor(name: str, velocity: float, effort: float, mode: int) -> tuple[float, float]:
    """(rad/s, N.m) of one motor in one hardware mode; even modes 12-16 repeat 11-15 with the waist locked."""
    gears = mode - 1 if mode in (12, 14, 16) else mode
    if "hip_pitch" in name and gears in (5, 13):
        return 32.0, 88.0
    if name.endswith(("wrist_pitch_joint", "wrist_yaw_joint")) and gears in (5, 11):
        return 22.0, 5.0
    return float(velocity), float(effort)


def g1(mode: int | str = DEFAULT_MODE, hands: str = "") -> Robot:
    """The G1 in one hardware mode (the `mode_machine` its LowState reports).

    Args:
        mode: 5, or 11 to 16. In 12, 14 and 16 the waist is locked: its roll and pitch are left out of the table.
        hands: "dex3" for Unitree's three-fingered hands, whose joints are driven too; "" for none.

    Raises:
        RobotError: unknown mode or hands.
    """
    try:
        number = int(mode)
    except (TypeError, ValueError):
        number = -1
    if number not in MODES:
        raise RobotError(f"G1 mode {mode!r} is not known; its LowState.mode_machine should be one of {MODES}")
    rows = list(_LEG_AND_WAIST)
    for side in ("left", "right"):
        for part, lower, upper, velocity, effort in _ARM_LIMITS:
            if side == "right" and part == "shoulder_roll":
                lower, upper = -upper, -lower
            rows.append((f"{side}_{part}_joint", lower, upper, velocity, effort, ARM_KP, ARM_KD))
    joints = []
    for index, (name, lower, upper, velocity, effort, kp, kd) in enumerate(rows):
        if number in (12, 14, 16) and name in ("waist_roll_joint", "waist_pitch_joint"):
            continue
        velocity, effort = _motor(name, velocity, effort, number)
        working = (min(WORKING_VELOCITY, velocity), WORKING_ACCELERATION)
        joints.append(Joint(name, lower, upper, *working, effort, kp, kd, 0.0, velocity, index))
    driven, notes = DRIVEN_JOINTS, f"Unitree G1, 29 joints, hardware mode {number}"
    if hands:
        if hands != "dex3":
            raise RobotError(f"hands {hands!r} of a G1 are not known; 'dex3' are")
        from vla_edge.robots.dex3 import SIDES, dex3

        for side in SIDES:
            joints += dex3(side)
            driven += tuple(joint.name for joint in dex3(side))
        notes += ", Dex3 hands"
    return Robot("g1", tuple(joints), driven, notes, number)
