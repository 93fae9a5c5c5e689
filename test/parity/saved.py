"""What an original has saved, and our runner of the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.types import JointState


class SavedReference:
    """One checkpoint and what its original made of it.

    Args:
        directory: with `checkpoint/` and `reference.npz`.
    """

    def __init__(self, directory: Path):
        self.checkpoint = load_checkpoint(directory / "checkpoint")
        self.spec = self.checkpoint.spec
        self.policy = load_policy(self.checkpoint)
        self.runner = Runner.from_policy(self.policy, self.checkpoint)
        with np.load(directory / "reference.npz") as arrays:
            self._arrays = dict(arrays)

    def __getitem__(self, key: tuple[int, str]) -> np.ndarray:
        index, name = key
        return self._arrays[f"{index}.{name}"]

    def joints(self, index: int, stamp_ns: int = 0) -> JointState:
        """Named in another order than the checkpoint's, as a robot might."""
        names = self.spec.joint_names
        order = np.random.default_rng(index).permutation(len(names))
        return JointState(stamp_ns, [names[i] for i in order], self[index, "positions"][order])

    def frames(self, index: int) -> dict[str, np.ndarray]:
        """Of each camera."""
        return {camera.name: self[index, f"frame.{camera.name}"] for camera in self.spec.cameras}
