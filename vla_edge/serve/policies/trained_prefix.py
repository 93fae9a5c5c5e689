"""Trained prefix (training-time real-time chunking; Black et al., 2025, arXiv:2512.05964): what the robot will have
executed when the chunk arrives is given to the policy as the chunk's first rows, without noise, and it writes the rest.
Only for checkpoints that were trained so, and then better than any guidance; see `learn.losses`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_edge.engine.continuation import Continuation
from vla_edge.serve.inference_policy import Request, Situation
from vla_edge.serve.plan import rows_from
from vla_edge.types import ActionChunk


@dataclass(frozen=True)
class TrainedPrefix:
    """The engine refuses a delay of more rows than its policy was trained for."""

    def due(self, running: ActionChunk | None, now_ns: int) -> bool:
        return True

    def prepare(self, situation: Situation) -> Request:
        observation, running = situation.observation, situation.running
        if running is None:
            return Request(observation)
        positions, known = rows_from(running, observation.stamp_ns)
        rows = min(situation.late_rows(running.dt), known)
        return Request(observation, Continuation(positions, np.zeros(len(positions)), prefix=rows))

    def place(self, chunk: ActionChunk, situation: Situation, now_ns: int) -> ActionChunk:
        return chunk
