"""Scripted experts in the place of the policy: what the loop around a policy can reach at most."""

from __future__ import annotations

import numpy as np

from vla_edge.types import ActionChunk, Observation

CHUNK_SIZE, DT = 32, 0.05


class ExpertPolicy:
    """Plans from the state of the world, which a policy only sees pictures of; for validating the closed loop.

    Args:
        chunk_size: points per chunk, at the 20 Hz of the expert.
    """

    def __init__(self, chunk_size: int = CHUNK_SIZE):
        self._chunk_size = chunk_size
        self._expert = None

    def bind(self, rig) -> None:
        """Tells which world the observations come from."""
        from vla_edge.sim.expert import Expert

        self._world = rig.world
        self._expert = Expert(rig.world)

    def __call__(self, observation: Observation, seed: int) -> ActionChunk:
        """The expert's next targets for what the world was asked."""
        targets = self._expert.plan(self._chunk_size)
        return ActionChunk(observation.stamp_ns, self._world.joint_names, targets, DT)


class MetaWorldExpertPolicy:
    """Meta-World's expert, who knows no plan: what it does in the steps to come is tried, and taken back."""

    def bind(self, rig) -> None:
        """Tells which world the observations come from."""
        self._world = rig.world

    def __call__(self, observation: Observation, seed: int) -> ActionChunk:
        """The expert's next targets for the task at hand, m; fewer where the episode's time ends."""
        from vla_edge.sim.metaworld import JOINTS, TIME_LIMIT_STEPS
        from vla_edge.sim.metaworld_demonstrations import CHUNK, DT, ROW_STEPS

        world, targets, now = self._world, [], self._world.snapshot()
        for _ in range(min(CHUNK * ROW_STEPS, TIME_LIMIT_STEPS - world.steps)):
            targets.append(world.expert_target())
            world.step(targets[-1])
        world.restore(now)
        targets += [targets[-1]] * (2 * ROW_STEPS - len(targets))  # a chunk has two points at least
        return ActionChunk(observation.stamp_ns, JOINTS, np.array(targets[ROW_STEPS - 1 :: ROW_STEPS]), DT)
