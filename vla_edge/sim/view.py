"""The state of the world as a flat list of numbers, small enough to record, and pictures drawn from it afterwards.

Drawing the robot from outside while it works would take a third of a small machine's processor away from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vla_edge.sim.world import SimulationError, Snapshot, TabletopWorld

_FIELDS = ("qpos", "mocap_pos", "mocap_quat")


def state_vector(snapshot: Snapshot) -> np.ndarray:
    """(N,) float64: everything about a state that can be seen, for one tier always the same N."""
    return np.concatenate([getattr(snapshot, name).ravel() for name in _FIELDS])


class RecordedView:
    """Draws recorded states. One world serves all episodes."""

    def __init__(self):
        self._world = TabletopWorld()
        self._scene: tuple[int, str] | None = None
        self._snapshot: Snapshot | None = None

    def begin(self, seed: int, tier: str) -> None:
        """The scene that the states to come belong to."""
        if self._scene != (seed, tier):
            self._world.reset(seed, tier)
            self._scene, self._snapshot = (seed, tier), self._world.snapshot()

    def render(self, state: Sequence[float], height: int, width: int, camera: str = "overview") -> np.ndarray:
        """(height, width, 3) uint8 RGB.

        Raises:
            SimulationError: no scene was begun, or the state belongs to another tier.
        """
        if self._snapshot is None:
            raise SimulationError("no scene has been begun; call begin first")
        state, at, arrays = np.asarray(state, np.float64), 0, {}
        wanted = sum(getattr(self._snapshot, name).size for name in _FIELDS)
        if state.shape != (wanted,):
            raise SimulationError(f"a recorded state has {state.size} numbers, the scene's have {wanted}; is it of this tier?")
        for name in _FIELDS:
            shape = getattr(self._snapshot, name).shape
            size = int(np.prod(shape))
            arrays[name] = state[at : at + size].reshape(shape)
            at += size
        self._world.restore(replace(self._snapshot, **arrays))
        return self._world.render(height, width, camera)

    def close(self) -> None:
        """Frees the drawing contexts."""
        self._world.close()
