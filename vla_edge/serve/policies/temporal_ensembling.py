"""Temporal ensembling (ACT; Zhao et al., 2023, arXiv:2304.13705): every moment's target is the weighted mean of what all
chunks that reach it say. Smooth, and behind the times when the scene changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vla_edge.serve.inference_policy import Request, Situation
from vla_edge.serve.plan import end_ns, positions_at, row_stamps
from vla_edge.types import ActionChunk


@dataclass(frozen=True)
class TemporalEnsembling:
    """The paper's weights exp(-decay * i), i = 0 for the oldest chunk that reaches a moment.

    Attributes:
        decay: 0 weighs all alike, larger trusts older chunks more, below 0 newer ones.
    """

    decay: float = 0.01

    def due(self, running: ActionChunk | None, now_ns: int) -> bool:
        return True

    def prepare(self, situation: Situation) -> Request:
        return Request(situation.observation)

    def place(self, chunk: ActionChunk, situation: Situation, now_ns: int) -> ActionChunk:
        stamps = row_stamps(chunk)
        total, weights = np.zeros_like(chunk.positions), np.zeros((len(stamps), 1))
        rank = np.zeros((len(stamps), 1))  # of the next chunk among those that reach the row
        for other in (*situation.recent, chunk):
            reaches = (stamps <= end_ns(other))[:, None]
            weight = np.where(reaches, np.exp(-self.decay * rank), 0.0)
            total += weight * positions_at(other, stamps, chunk.joint_names)
            weights += weight
            rank += reaches
        return replace(chunk, positions=total / weights)
