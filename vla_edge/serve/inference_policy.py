"""The seam between the engine and the robot: when to infer, what to show the engine, and how to place what it gives.

An inference policy holds no state and reads no clock, so that the same object decides live, in the lockstep closed
loop and in replay; what it needs to know is in the `Situation`. All place chunks by the observation's stamp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from vla_edge.engine.continuation import Continuation
from vla_edge.types import ActionChunk, Observation, VlaEdgeError


class InferencePolicyError(VlaEdgeError):
    """An inference policy that does not exist, cannot have these options, or cannot be used with this engine."""


@dataclass(frozen=True)
class Situation:
    """What is known when an inference begins.

    Attributes:
        observation: newest one.
        running: chunk that the robot follows, as it was published; None at the start, and when the robot is somewhere
            else than that chunk says.
        recent: newest chunks as the engine gave them, for the same instruction, oldest first.
        same_instruction: whether `running` answers the instruction of the observation.
        delay: s from an observation's stamp to its published chunk, 95th percentile of those measured; NaN before the
            first.
    """

    observation: Observation
    running: ActionChunk | None
    recent: tuple[ActionChunk, ...]
    same_instruction: bool
    delay: float

    def late_rows(self, dt: float) -> int:
        """Rows of the new chunk that will have been passed when it arrives, and the one that is then next."""
        # Below zero where the camera's clock is ahead of this computer's.
        return 0 if math.isnan(self.delay) else max(0, math.ceil(self.delay / dt - 1e-9))


@dataclass(frozen=True)
class Request:
    """What an engine is asked.

    Attributes:
        observation: to be shown to the policy; its stamp is that of the situation's.
        continuation: of a running plan, None for a chunk that owes nothing to what was before.
    """

    observation: Observation
    continuation: Continuation | None = None


class InferencePolicy(Protocol):
    """How observations become the chunks a robot follows."""

    def due(self, running: ActionChunk | None, now_ns: int) -> bool:
        """Whether an inference may begin at `now_ns` (the clock of the stamps) while `running` is followed."""

    def prepare(self, situation: Situation) -> Request:
        """What to ask the engine."""

    def place(self, chunk: ActionChunk, situation: Situation, now_ns: int) -> ActionChunk:
        """The chunk to publish at `now_ns`, of the same joints, rows, dt and stamp as `chunk`, which answered the
        request for `situation`."""
