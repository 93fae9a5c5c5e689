"""Torque fed forward with the command: against gravity, led in, and inside the joints' limits."""

from __future__ import annotations

import numpy as np

from vla_edge.control.config import ControlConfig
from vla_edge.control.gravity import Gravity
from vla_edge.robots.robot import Robot, RobotError


class FeedForward:
    """Torques for J joints.

    Args:
        robot: exactly the driven joints.
        most: (J,) N.m that may be fed forward.

    Raises:
        RobotError: a joint whose torque limit is not known.
    """

    def __init__(self, robot: Robot, gravity: Gravity, config: ControlConfig, most: np.ndarray):
        effort = robot.column("effort")
        if np.any(effort <= 0.0):
            name = robot.joint_names[int(np.argmin(effort))]
            raise RobotError(
                f"joint {name!r} has no torque limit (effort); torque against gravity cannot be fed forward without one"
            )
        self._gravity, self._scale, self._most = gravity, config.gravity_scale, most

    def torque(self, position: np.ndarray, share: float, out: np.ndarray) -> np.ndarray:
        """`share` (0 to 1) of the torque at (J,) rad into `out` (J,) N.m; what is not finite becomes zero."""
        np.multiply(self._gravity.torque(position), self._scale * share, out)
        np.copyto(out, 0.0, where=~np.isfinite(out))
        return np.clip(out, -self._most, self._most, out=out)
