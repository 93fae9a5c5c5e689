"""Inference at a steady rate in a thread of its own, always on the newest observation, never on a queue of old ones.

A frame that is due starts an inference the moment it arrives, so an observation waits for nothing but an inference
that is already running; frames that are not due cost nothing. While one chunk is being computed the robot executes
the one before: chunks carry the stamp of their observation, and the controller places them by it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from vla_edge.observe.align import Alignment, Readiness
from vla_edge.serve.latency import RollingLatency, StageLatencies
from vla_edge.types import ActionChunk, InferenceTiming, Observation, VlaEdgeError

NANOSECONDS = 1_000_000_000
RECENT = 20
"""Inferences by which it is judged whether an engine keeps its rate."""


@dataclass(frozen=True)
class ChunkTiming:
    """The way of one observation through the loop, s.

    Attributes:
        waited: for an inference that was running when the observation arrived.
        engine: the runner's own time.
        overhead: everything else from arrival to the published chunk.
        from_stamp: the same from the observation's stamp on, with the camera's driver and the way here.
    """

    waited: float
    engine: float
    overhead: float
    from_stamp: float

    @property
    def total(self) -> float:
        """From arrival to the published chunk."""
        return self.waited + self.engine + self.overhead


class InferenceLoop:
    """Runs `infer` on what `align` gives, and hands each chunk to `publish`.

    Args:
        align: newest observation at a moment of the steady clock, or why there is none.
        infer: observation -> (chunk, timing); raises VlaEdgeError on an observation it refuses.
        publish: takes the chunk; called from the loop's thread.
        rate_hz: inferences per second, as long as the engine keeps up.
        on_problem: called with a sentence when an observation was refused or the engine failed.
        on_thread: called first in the loop's thread, for example to ask for its priority.
        due: whether an inference may begin with this observation; frames pass by as long as not.
        wanted: whether a chunk for this observation may still be published when it is ready. One for an instruction
            that was changed or withdrawn meanwhile is not, and the next observation is taken at once.
        clock: of the observations' stamps, ns.

    Attributes:
        chunks: published so far.
        unwanted: chunks dropped since they answered what nobody asks any more.
        busy_since_ns: steady clock, when the inference underway began; None between inferences.
        refused: sentence -> observations refused.
        state: newest readiness, with its reason.
        arrival_to_chunk, overhead, from_stamp, waited: rolling latencies, s.
        stages: rolling latencies of the engine's stages, s, and of alignment with the decoding of pictures ("align").
        recent_engine: time of the latest inferences, s, since `forget_timing`.
        passes, decoded: since then, of a language model over tokens of chunks, and tokens in them.
    """

    def __init__(
        self,
        align: Callable[[int], Alignment],
        infer: Callable[..., tuple[ActionChunk, InferenceTiming]],
        publish: Callable[[ActionChunk], None],
        rate_hz: float,
        on_problem: Callable[[str], None] = lambda sentence: None,
        on_thread: Callable[[], object] = lambda: None,
        due: Callable[[Observation], bool] = lambda observation: True,
        wanted: Callable[[Observation], bool] = lambda observation: True,
        clock: Callable[[], int] = time.time_ns,
    ):
        self._align, self._infer, self._publish, self._on_problem = align, infer, publish, on_problem
        self._on_thread, self._may_begin, self._wanted, self._clock = on_thread, due, wanted, clock
        self._period_ns = NANOSECONDS / rate_hz
        self._condition = threading.Condition()
        self._due = False
        self._slot: int | None = None
        self._running = False
        self._thread: threading.Thread | None = None
        self._free_since_ns = 0
        self.chunks = self.unwanted = 0
        self.busy_since_ns: int | None = None
        self.refused: Counter[str] = Counter()
        self.state = Alignment(Readiness.WAITING, "not started")
        self.arrival_to_chunk, self.overhead, self.from_stamp, self.waited = (RollingLatency() for _ in range(4))
        self.forget_timing()

    def forget_timing(self) -> None:
        """Another engine serves: its stages are timed anew."""
        self.stages, self.recent_engine = StageLatencies(), RollingLatency(RECENT)
        self.passes = self.decoded = 0

    @property
    def running(self) -> bool:
        """Whether chunks may be published."""
        return self._running

    def start(self) -> None:
        """Begins to serve; nothing happens when it already does."""
        if self._running:
            return
        self._join()
        with self._condition:
            self._running, self._due, self._slot = True, False, None
        self._thread = threading.Thread(target=self._serve, name="inference", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends serving: once this returns, no further chunk is published. An inference underway is finished, unheard."""
        with self._condition:
            self._running = False
            self._condition.notify()
        self._join(timeout)

    def frame_arrived(self, arrival_ns: int) -> None:
        """Tells that a frame of the pacing camera came at `arrival_ns` (steady clock)."""
        slot = math.floor(arrival_ns / self._period_ns + 0.25)
        with self._condition:
            if self._running and (self._slot is None or slot > self._slot):
                self._due, self._slot = True, slot
                self._condition.notify()

    def _join(self, timeout: float = 10.0) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _serve(self) -> None:
        self._on_thread()
        while True:
            with self._condition:
                # The timeout keeps `state` true while no frame comes at all.
                due = self._condition.wait_for(lambda: self._due or not self._running, timeout=0.5)
                if not self._running:
                    return
                self._due = False
            began_ns = time.monotonic_ns()
            alignment = self._align(began_ns)
            self.state = alignment
            if due and alignment.readiness is Readiness.READY and self._may_begin(alignment.observation):
                self.busy_since_ns = time.monotonic_ns()
                self.stages.add("align", (self.busy_since_ns - began_ns) / NANOSECONDS)
                self._serve_one(alignment)
                self.busy_since_ns = None

    def _serve_one(self, alignment: Alignment) -> None:
        try:
            chunk, timing = self._infer(alignment.observation)
        except VlaEdgeError as error:
            self.refused[str(error)] += 1
            self._on_problem(str(error))
            self._free_since_ns = time.monotonic_ns()
            return
        except Exception as error:  # noqa: BLE001 - the thread must outlive whatever a backend raises
            sentence = f"the engine failed with {type(error).__name__}: {error}"
            self.refused[sentence] += 1
            self._on_problem(sentence)
            self._free_since_ns = time.monotonic_ns()
            return
        with self._condition:
            if not self._running:
                return
            if not self._wanted(alignment.observation):
                self.unwanted += 1
                self._due = True
                return
            # Under the lock, so that stop() cannot return between the check and the chunk.
            self._publish(chunk)
            self.chunks += 1
        self._note(alignment, timing)

    def _note(self, alignment: Alignment, timing: InferenceTiming) -> ChunkTiming:
        now_ns, since_stamp_ns = time.monotonic_ns(), self._clock() - alignment.observation.stamp_ns
        total = (now_ns - alignment.arrival_ns) / NANOSECONDS
        waited = max(0, self._free_since_ns - alignment.arrival_ns) / NANOSECONDS
        self._free_since_ns = now_ns
        known = waited + timing.total
        noted = ChunkTiming(waited, timing.total, total - known, since_stamp_ns / NANOSECONDS - known)
        self.arrival_to_chunk.add(total)
        self.from_stamp.add(noted.from_stamp)
        self.waited.add(waited)
        self.overhead.add(noted.overhead)
        self.stages.add("preprocess", timing.preprocess)
        for stage, seconds in timing.stages.items():
            self.stages.add(stage, seconds)
        self.stages.add("postprocess", timing.postprocess)
        self.stages.add("engine", timing.total)
        self.recent_engine.add(timing.total)
        self.passes, self.decoded = self.passes + timing.passes, self.decoded + timing.decoded
        return noted
