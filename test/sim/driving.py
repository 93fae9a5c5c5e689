"""Driving the world by hand."""

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.expert import DT
from vla_edge.types import JointCommand


def follow(world, start, end):
    """Linear targets from `start` to `end` over one step of a plan, as the controller would spline them."""
    for part in range(1, 6):
        position = start + (end - start) * part / 5
        velocity = (end - start) / DT
        world.apply(JointCommand(world.time_ns, DRIVEN_JOINTS, position, velocity, np.zeros(15)))
        world.step(DT / 5)
