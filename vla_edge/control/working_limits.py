"""The limits a controller works with: those of the robot's table, scaled and narrowed by its parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_edge.control.config import ControlConfig
from vla_edge.robots.robot import Robot, RobotError


@dataclass(frozen=True)
class WorkingLimits:
    """Limits of J joints, each (J,).

    Attributes:
        lower, upper: rad. velocity: rad/s. acceleration: rad/s^2. jerk: rad/s^3.
        torque: N.m that may be fed forward.
    """

    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    torque: np.ndarray

    @staticmethod
    def of(robot: Robot, config: ControlConfig) -> WorkingLimits:
        """Of exactly the joints of `robot`. Raises RobotError when a joint has no room left between its limits."""
        lower = robot.column("lower") + config.position_margin
        upper = robot.column("upper") - config.position_margin
        if np.any(lower >= upper):
            name = robot.joint_names[int(np.argmax(lower - upper))]
            raise RobotError(
                f"joint {name!r} has no room left between its limits with a position_margin of "
                f"{config.position_margin} rad; lower the margin"
            )
        return WorkingLimits(
            lower, upper, robot.column("velocity") * config.velocity_scale,
            robot.column("acceleration") * config.acceleration_scale, robot.column("jerk") * config.jerk_scale,
            robot.column("effort") * config.torque_scale,
        )
