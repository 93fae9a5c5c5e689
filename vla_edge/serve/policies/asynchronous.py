"""Asynchronous inference with overlap: the robot follows one chunk while the next is computed, and changes to it the
moment it comes. The controller fades from one into the other."""

from __future__ import annotations

from dataclasses import dataclass

from vla_edge.serve.inference_policy import Request, Situation
from vla_edge.types import ActionChunk


@dataclass(frozen=True)
class Asynchronous:
    """Chunks as the engine gives them, as often as it can. What the other policies are built on."""

    def due(self, running: ActionChunk | None, now_ns: int) -> bool:
        return True

    def prepare(self, situation: Situation) -> Request:
        return Request(situation.observation)

    def place(self, chunk: ActionChunk, situation: Situation, now_ns: int) -> ActionChunk:
        return chunk
