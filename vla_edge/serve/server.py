"""An engine behind an inference policy: observations in, chunks to publish out, and the delay between them measured.

What is remembered as running is when the robot carries a chunk out, which is not always when its stamp says: a controller
that has been standing since the observation begins with a chunk's beginning, however late it comes (see
`control.timeline`). From then on the robot is behind the stamp by that time, and a chunk that continues the plan has to
continue it there.

Used by the node's inference loop, by the lockstep closed loop and by replay alike. It reads no clock: it is told the
time, on the clock of the stamps.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from typing import Protocol

from vla_edge.engine.continuation import Continuation
from vla_edge.serve.inference_policy import InferencePolicy, Situation
from vla_edge.serve.latency import RollingLatency
from vla_edge.serve.plan import end_ns, strayed
from vla_edge.types import NANOSECONDS, ActionChunk, InferenceTiming, Observation

RECENT_CHUNKS = 64
DELAY_WINDOW = 100
"""Chunks over which the delay's percentile is taken."""
STRAY = 0.25
"""rad between a plan and the measured joints beyond which the robot is not following that plan: it was held, moved by
hand, or the chunk was refused."""

HOLD_AFTER_NS = NANOSECONDS // 10
"""From the last row of a chunk to the controller's HOLD."""


class Engine(Protocol):
    """What is served: `engine.runner.Runner`, or anything that behaves like one."""

    def infer(self, observation: Observation, seed: int = 0, *, continuation: Continuation | None = None): ...


class ChunkServer:
    """Serves one robot. `infer` and `deliver` are called in turn from one thread; the rest from any.

    Args:
        engine: may be exchanged between chunks, see `use`.
        policy: likewise.
        seed: of the policy's noise.

    Attributes:
        delay: s from observation stamp to published chunk, rolling.
    """

    def __init__(self, engine: Engine, policy: InferencePolicy, seed: int = 0):
        self._lock = threading.Lock()
        self._engine, self._policy, self._seed = engine, policy, seed
        self.delay = RollingLatency(DELAY_WINDOW)
        self.forget()

    @property
    def running(self) -> ActionChunk | None:
        """What the robot follows, its stamp set to when it really began."""
        return self._running

    @property
    def policy(self) -> InferencePolicy:
        return self._policy

    @property
    def engine(self) -> Engine:
        return self._engine

    def use(self, engine: Engine | None = None, policy: InferencePolicy | None = None) -> None:
        """Another engine or policy from the next inference on; what is running goes on and is continued."""
        with self._lock:
            if engine is not None and engine is not self._engine:
                self._engine = engine
                # Another engine has another delay.
                self.delay = RollingLatency(DELAY_WINDOW)
            self._policy = policy or self._policy

    def forget(self) -> None:
        """Nothing is running any more: the robot begins anew."""
        with self._lock:
            self._running: ActionChunk | None = None
            self._instruction = ""
            self._recent: deque[ActionChunk] = deque(maxlen=RECENT_CHUNKS)

    def due(self, instruction: str, now_ns: int) -> bool:
        """Whether an inference may begin at `now_ns`. A new instruction waits for nothing."""
        with self._lock:
            running = self._running
            return instruction != self._instruction or self._policy.due(running, now_ns)

    def infer(self, observation: Observation) -> tuple[ActionChunk, InferenceTiming]:
        """Asks the engine. The chunk is not yet what is to be published: see `deliver`.

        Raises:
            VlaEdgeError: the engine refuses the observation.
        """
        with self._lock:
            engine, policy, situation = self._engine, self._policy, self._situation(observation)
        request = policy.prepare(situation)
        wanted = {} if request.continuation is None else {"continuation": request.continuation}
        inference = engine.infer(request.observation, seed=self._seed, **wanted)
        self._underway = policy, situation
        return inference.chunk, inference.timing

    def deliver(self, chunk: ActionChunk, now_ns: int) -> ActionChunk:
        """The chunk to publish at `now_ns` for the one that `infer` gave last; it is what runs from then on."""
        policy, situation = self._underway
        placed = policy.place(chunk, situation, now_ns)
        with self._lock:
            self.delay.add((now_ns - chunk.stamp_ns) / NANOSECONDS)
            stands_from = chunk.stamp_ns if self._running is None else end_ns(self._running) + HOLD_AFTER_NS
            stood_ns = max(0, now_ns - max(stands_from, chunk.stamp_ns))
            self._running, self._instruction = _later(placed, stood_ns), situation.observation.instruction
            self._recent = deque((*situation.recent, _later(chunk, stood_ns)), RECENT_CHUNKS)
        return placed

    def _situation(self, observation: Observation) -> Situation:
        running, stamp_ns = self._running, observation.stamp_ns
        # A clock that was set back, a plan that is over or one that is not followed: nothing to continue.
        if running is not None and (
            not running.stamp_ns <= stamp_ns < end_ns(running) or strayed(running, observation.joints, stamp_ns) > STRAY
        ):
            running = None
        same = observation.instruction == self._instruction
        recent = tuple(c for c in self._recent if end_ns(c) > stamp_ns) if same and running is not None else ()
        return Situation(observation, running, recent, same, self.delay.summary().p95)


def _later(chunk: ActionChunk, by_ns: int) -> ActionChunk:
    return replace(chunk, stamp_ns=chunk.stamp_ns + by_ns) if by_ns else chunk
