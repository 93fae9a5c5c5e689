"""Arrival-offset cancel with fade: what a chunk differs from the running one at the moment it arrives is taken off it,
and given back little by little. For controllers that follow chunks as they come; ours fades in any case."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vla_edge.serve.inference_policy import InferencePolicyError, Request, Situation
from vla_edge.serve.plan import positions_at, row_stamps
from vla_edge.types import NANOSECONDS, ActionChunk


@dataclass(frozen=True)
class OffsetCancel:
    """Position offset at arrival, faded out as a quintic.

    Attributes:
        fade: s from the arrival until the chunk is as the engine gave it.
    """

    fade: float = 0.4

    def __post_init__(self):
        if not self.fade > 0.0:
            raise InferencePolicyError(f"fade is {self.fade}; it must be above 0 s")

    def due(self, running: ActionChunk | None, now_ns: int) -> bool:
        return True

    def prepare(self, situation: Situation) -> Request:
        return Request(situation.observation)

    def place(self, chunk: ActionChunk, situation: Situation, now_ns: int) -> ActionChunk:
        if situation.running is None:
            return chunk
        arrival = np.array([now_ns])
        offset = positions_at(situation.running, arrival, chunk.joint_names) - positions_at(chunk, arrival)
        u = np.clip((row_stamps(chunk) - now_ns) / (self.fade * NANOSECONDS), 0.0, 1.0)[:, None]
        return replace(chunk, positions=chunk.positions + offset * (1.0 - u**3 * (10.0 - 15.0 * u + 6.0 * u**2)))
