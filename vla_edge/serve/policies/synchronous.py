"""Synchronous inference: execute part of a chunk, stand, look, think, and only then move on. What most demonstrations
of policies do; on a robot it is slow, and never wrong about where the robot is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from vla_edge.serve.inference_policy import Request, Situation
from vla_edge.serve.plan import positions_at, row_stamps
from vla_edge.types import NANOSECONDS, ActionChunk


@dataclass(frozen=True)
class Synchronous:
    """One chunk after the other.

    Attributes:
        execute: s of each chunk that are carried out before the next observation is taken.
        settle: s that the robot stands before it is looked at, while its joints catch up with the command.
    """

    execute: float = 0.8
    settle: float = 0.1

    def due(self, running: ActionChunk | None, now_ns: int) -> bool:
        return running is None or now_ns >= _stands_from(running) + round(self.settle * NANOSECONDS)

    def prepare(self, situation: Situation) -> Request:
        return Request(situation.observation)

    def place(self, chunk: ActionChunk, situation: Situation, now_ns: int) -> ActionChunk:
        running, rows = situation.running, np.arange(len(chunk.positions))
        if running is None:
            # Nobody follows anything, and a chunk is begun at its beginning whenever it comes.
            executed = min(max(round(self.execute / chunk.dt), 1), len(rows))
            return replace(chunk, positions=chunk.positions[np.minimum(rows, executed - 1)])
        # The end of the running chunk was followed while this one was computed: it begins now, and stands at its end.
        lead = max(now_ns - chunk.stamp_ns, 0) / (chunk.dt * NANOSECONDS)
        executed = max(1, min(round(self.execute / chunk.dt), len(rows) - math.ceil(lead)))
        at = np.minimum(rows - lead, executed - 1)
        start = positions_at(running, np.array([now_ns]), chunk.joint_names)
        path = np.concatenate([start, chunk.positions[:executed]])
        knots = np.arange(-1, executed)
        moved = np.stack([np.interp(at, knots, path[:, j]) for j in range(path.shape[1])], axis=1)
        return replace(chunk, positions=moved)


def _stands_from(chunk: ActionChunk) -> int:
    """The moment from which a chunk stands still, ns."""
    moving = np.flatnonzero(np.any(chunk.positions != chunk.positions[-1], axis=1))
    return int(row_stamps(chunk)[min(moving[-1] + 1 if moving.size else 0, len(chunk.positions) - 1)])
