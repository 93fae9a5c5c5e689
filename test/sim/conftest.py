import pytest
from driving import follow

from vla_edge.sim.expert import Expert
from vla_edge.sim.world import TabletopWorld


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
