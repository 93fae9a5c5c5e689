import numpy as np
import pytest

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.expert import DT, Expert
from vla_edge.sim.world import TabletopWorld
from vla_edge.types import JointCommand


@pytest.fixture(scope="session")
def world():
    world = TabletopWorld()
    yield world
    world.close()


@pytest.fixture(scope="session")
def expert(world):
    return Expert(world)


@pytest.fixture(scope="session")
def carry_out(world, expert):
    """Drives the world by the expert, replanned every 0.2 s as a policy at 5 Hz would be, until `seconds` passed or the
    goal is decided."""

    def run(seconds: float | None = None):
        until = world.elapsed_s + (seconds or world.episode.time_limit_s)
        while world.elapsed_s < until - 1e-9 and (seconds or not world.finished()):
            before = world.joint_state().position
            for target in expert.plan(4):
                follow(world, before, target)
                before = target
        return world.outcome()

    return run


def follow(world, start, end):
    """Linear targets from `start` to `end` over one step of a plan, as the controller would spline them."""
    for part in range(1, 6):
        position = start + (end - start) * part / 5
        velocity = (end - start) / DT
        world.apply(JointCommand(world.time_ns, DRIVEN_JOINTS, position, velocity, np.zeros(15)))
        world.step(DT / 5)
