"""A runner that needs no engine: its chunk shows what it was given."""

from __future__ import annotations

import numpy as np
from tiny import tiny_spec

from vla_edge.engine.runner import Inference
from vla_edge.policy.preprocess import ObservationError
from vla_edge.types import ActionChunk, InferenceTiming


class StubRunner:
    """Step t of joint j is its position + t + the mean of the image + the seed; refuses the instruction "no"."""

    def __init__(self):
        self.spec = tiny_spec()

    def infer(self, observation, seed=0, noise=None):
        if observation.instruction == "no":
            raise ObservationError("the instruction 'no' is not known; say another")
        steps = np.arange(self.spec.chunk_size)[:, None] + observation.images["head"].mean() + seed
        positions = steps + observation.joints.position[None]
        chunk = ActionChunk(observation.stamp_ns, self.spec.joint_names, positions, self.spec.dt)
        return Inference(chunk, InferenceTiming(0.0, {"vision": 0.001}, 0.0, 0.002))

    def warm_up(self, repeats=2):
        pass

    def description(self):
        return {"name": "stub", "backend": "numpy", "bytes": 3}
