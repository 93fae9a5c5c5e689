"""The scripted expert in the place of the policy: what the loop around a policy can reach at most."""

from __future__ import annotations

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
