"""An engine without a network: a chunk from a function of the observation, and a record of what it was asked."""

from __future__ import annotations

import numpy as np

from vla_edge.engine.runner import Inference
from vla_edge.types import NANOSECONDS, ActionChunk, InferenceTiming, JointState, Observation

NAMES, DT, ROWS = ("a", "b"), 0.05, 20


def observation(seconds: float, position=(0.0, 0.0), instruction: str = "go") -> Observation:
    stamp_ns = round(seconds * NANOSECONDS)
    return Observation(stamp_ns, {}, JointState(stamp_ns, NAMES, position), instruction)


def ramp(observation: Observation, slope: float = 0.5, offset: float = 0.0) -> np.ndarray:
    """From the measured joints on, `slope` rad/s."""
    return observation.joints.position + offset + slope * DT * np.arange(1, ROWS + 1)[:, None]


class FakeEngine:
    def __init__(self, rows=ramp):
        self._rows, self.asked = rows, []

    def infer(self, observation, seed=0, continuation=None):
        self.asked.append((observation, continuation))
        return Inference(ActionChunk(observation.stamp_ns, NAMES, self._rows(observation), DT), InferenceTiming(0.0))


def ns(seconds: float) -> int:
    return round(seconds * NANOSECONDS)
