"""Real-time chunking (Black, Galliker and Levine, 2025, arXiv:2506.07339): the new chunk is made to continue the running
one. What the robot will have executed when the chunk arrives is frozen, what both plan is joined softly, the rest is
free; see `engine.continuation` for how the flow is led there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_edge.engine.continuation import Continuation
from vla_edge.serve.inference_policy import InferencePolicyError, Request, Situation
from vla_edge.serve.plan import rows_from
from vla_edge.types import ActionChunk


@dataclass(frozen=True)
class RealTimeChunking:
    """Inpainting of the running chunk.

    Attributes:
        overlap: s after the frozen rows over which the running chunk still counts, less and less.
        begin: flow time, 1 to 0, from which on it counts. A policy that sees its own plan from the start takes it for
            an expert's and follows it rather than the picture; later on what it sees has decided where to go, and the
            plan decides only how to get there.
    """

    overlap: float = 0.2
    begin: float = 0.3

    def __post_init__(self):
        if not 0.0 <= self.begin <= 1.0:
            raise InferencePolicyError(f"begin is {self.begin}; it must be a flow time from 0 to 1")

    def due(self, running: ActionChunk | None, now_ns: int) -> bool:
        return True

    def prepare(self, situation: Situation) -> Request:
        running, observation = situation.running, situation.observation
        if running is None:
            return Request(observation)
        positions, known = rows_from(running, observation.stamp_ns)
        frozen = min(situation.late_rows(running.dt), known)
        # A plan for another instruction is left as soon as it can be.
        joined = frozen + round(self.overlap / running.dt) if situation.same_instruction else frozen
        weights = soft_mask(len(positions), frozen, min(joined, known))
        if not weights.any():
            return Request(observation)
        return Request(observation, Continuation(positions, weights, self.begin))

    def place(self, chunk: ActionChunk, situation: Situation, now_ns: int) -> ActionChunk:
        return chunk


def soft_mask(rows: int, frozen: int, joined: int) -> np.ndarray:
    """(rows,): 1 on the first `frozen`, falling to 0 at row `joined`, 0 from there on: the paper's soft mask."""
    index = np.arange(rows)
    falling = (joined - index) / (joined - frozen + 1)
    soft = falling * np.expm1(np.clip(falling, 0.0, 1.0)) / (np.e - 1.0)
    return np.where(index < frozen, 1.0, np.where(index < joined, soft, 0.0))
