"""vla_edge.json: what a robot must know of a policy and no training library says (doc/checkpoint.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json
from vla_edge.policy.spec import CameraSpec, Normalization

ROBOT_FILE = "vla_edge.json"


class RobotFacts:
    """The entries of vla_edge.json.

    Attributes:
        joint_names: of state and action, in the order of the tensors. dt: s between points of a chunk.
        state_names: of the state, where vla_edge.json names others for it. relative_actions: actions are offsets to
            the measured positions. trained_prefix: most first rows of a chunk that the policy can be given.
    """

    def __init__(self, directory: Path):
        """Raises CheckpointError, ValueError: it is missing, or an entry is not what it must be."""
        if not (directory / ROBOT_FILE).is_file():
            raise CheckpointError(
                f"{directory} has no {ROBOT_FILE}, which says what joints and cameras the policy was trained with; "
                "write it as doc/checkpoint.md tells"
            )
        self.entries = read_json(directory / ROBOT_FILE)
        self.joint_names, self.dt = tuple(self.entries["joint_names"]), float(self.entries["dt"])
        self.state_names = tuple(self.entries.get("state_names", self.joint_names))
        if len(set(self.joint_names)) != len(self.joint_names):
            raise ValueError(f"{ROBOT_FILE} names a joint twice")
        if not 0 < self.dt < np.inf:
            raise ValueError(f"{ROBOT_FILE} says dt = {self.dt} s")
        self.relative_actions = bool(self.entries["relative_actions"])
        self.trained_prefix = self.entries.count("trained_prefix") if "trained_prefix" in self.entries else 0

    @property
    def cameras(self) -> Document:
        """Name -> facts, in the order they were written."""
        return self.entries["cameras"]

    def camera(
        self, name: str, key: str, size: tuple[int, int], shape: Sequence[int] | None = None, **fit
    ) -> CameraSpec:
        """One camera.

        Args:
            key: the checkpoint's name of it. size: (height, width) the network takes.
            shape: (height, width) of the checkpoint's feature, where it has one.
            fit: of `CameraSpec`.

        Raises:
            CheckpointError, ValueError: it is not described, or its crop does not fit.
        """
        facts = self.cameras[name]
        source, crop = (facts.count("height"), facts.count("width")), tuple(facts["crop"])
        if shape is not None and crop[2:] != tuple(shape):
            raise ValueError(f"camera {name}: crop {crop} does not give the feature's shape {tuple(shape)}")
        if min(crop) < 0 or crop[0] + crop[2] > source[0] or crop[1] + crop[3] > source[1]:
            raise ValueError(f"camera {name}: crop {crop} leaves the {source[0]} x {source[1]} frame")
        return CameraSpec(name, key, *source, crop, *size, **fit)

    def check_statistics(self, **normalizations: Normalization) -> None:
        """Nothing, when each has one value per joint.

        Raises:
            ValueError: which has not.
        """
        for name, normalization in normalizations.items():
            if any(np.shape(part)[-1:] not in ((), (len(self.joint_names),)) for part in normalization.affine()):
                raise ValueError(f"the statistics of {name} are not of {len(self.joint_names)} joints")
