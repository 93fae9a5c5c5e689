"""The loop serves the newest observation at its rate, in its own thread, and survives what it is given."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from vla_edge.observe.align import Aligner, Alignment, Frame, Readiness
from vla_edge.serve.inference_loop import InferenceLoop
from vla_edge.types import ActionChunk, InferenceTiming, JointState, Observation, VlaEdgeError


class Source:
    """A camera: the newest observation is the newest frame it has sent."""

    def __init__(self):
        self.stamp = 0
        self.arrival_ns = 0

    def send(self, loop: InferenceLoop) -> None:
        self.stamp += 1
        self.arrival_ns = time.monotonic_ns()
        loop.frame_arrived(self.arrival_ns)

    def align(self, now_ns: int) -> Alignment:
        joints = JointState(self.stamp, ("a",), [0.0])
        return Alignment(Readiness.READY, "", Observation(self.stamp, {}, joints, "go"), self.arrival_ns)


def serve(infer, rate_hz: float, seconds: float, frame_rate: float = 100.0):
    """Runs a loop for a while; returns it, the source, and (stamp, thread, time) of each chunk."""
    source, chunks = Source(), []

    def publish(chunk):
        chunks.append((chunk.stamp_ns, threading.current_thread(), time.monotonic()))

    loop = InferenceLoop(source.align, infer, publish, rate_hz)
    loop.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        source.send(loop)
        time.sleep(1.0 / frame_rate)
    loop.stop()
    return loop, source, chunks


def answer(observation, seconds: float = 0.0):
    time.sleep(seconds)
    timing = InferenceTiming(0.0, {"denoise": seconds}, 0.0, seconds)
    return ActionChunk(observation.stamp_ns, ("a",), np.zeros((4, 1)), 0.05), timing


def test_the_rate_is_kept_whatever_the_frame_rate():
    _, _, chunks = serve(answer, rate_hz=20.0, seconds=1.0, frame_rate=130.0)
    assert 18 <= len(chunks) <= 22


def test_observations_are_never_queued_when_the_engine_is_slow():
    seen = []

    def slow(observation):
        seen.append(observation.stamp_ns)
        return answer(observation, 0.1)

    loop, source, chunks = serve(slow, rate_hz=50.0, seconds=1.0)
    assert 6 <= len(chunks) <= 11
    # Each inference began with a frame newer than all that came during the one before: about ten of them.
    assert np.diff(seen).min() >= 5
    assert loop.chunks == len(chunks)


def test_inference_runs_in_a_thread_of_its_own():
    _, _, chunks = serve(answer, rate_hz=20.0, seconds=0.3)
    assert {thread.name for _, thread, _ in chunks} == {"inference"}


def test_nothing_is_published_once_stop_has_returned():
    source, chunks = Source(), []
    loop = InferenceLoop(source.align, lambda o: answer(o, 0.2), chunks.append, 100.0)
    loop.start()
    source.send(loop)
    time.sleep(0.05)
    loop.stop()
    assert not chunks and not loop.running
    time.sleep(0.3)
    assert not chunks


def test_it_starts_again_after_a_stop():
    source, chunks = Source(), []
    loop = InferenceLoop(source.align, answer, chunks.append, 100.0)
    for _ in range(3):
        loop.start()
        loop.start()
        before = len(chunks)
        end = time.monotonic() + 2.0
        while len(chunks) == before and time.monotonic() < end:
            source.send(loop)
            time.sleep(0.005)
        loop.stop()
        assert len(chunks) > before


class Refused(VlaEdgeError):
    """What an engine raises on an observation it cannot be shown."""


@pytest.mark.parametrize("error", (Refused("no such joint"), RuntimeError("out of memory")))
def test_a_refused_observation_is_counted_and_the_next_one_served(error):
    calls, problems = [], []

    def infer(observation):
        calls.append(observation)
        if len(calls) % 2:
            raise error
        return answer(observation)

    source, chunks = Source(), []
    loop = InferenceLoop(source.align, infer, chunks.append, 200.0, problems.append)
    loop.start()
    end = time.monotonic() + 5.0
    while len(chunks) < 3 and time.monotonic() < end:
        source.send(loop)
        time.sleep(0.005)
    loop.stop()
    assert len(chunks) >= 3 and loop.refused.total() >= 3
    assert all(str(error) in problem for problem in problems) and len(problems) == loop.refused.total()


def test_the_time_of_an_observation_is_accounted_for():
    loop, _, chunks = serve(lambda o: answer(o, 0.05), rate_hz=10.0, seconds=1.0)
    total, overhead = loop.arrival_to_chunk.summary(), loop.overhead.summary()
    assert total.count == len(chunks)
    assert 0.05 <= total.p50 < 0.09
    assert 0.0 <= overhead.p50 < 0.01
    assert loop.stages.summaries()["denoise"].p50 == pytest.approx(0.05)


def test_passes_over_tokens_are_counted_until_another_engine_serves():
    def decoded(observation):
        chunk, _ = answer(observation)
        return chunk, InferenceTiming(0.0, passes=2, decoded=6)

    loop, _, _ = serve(decoded, rate_hz=50.0, seconds=0.3)
    assert loop.chunks > 2 and (loop.passes, loop.decoded) == (2 * loop.chunks, 6 * loop.chunks)
    loop.forget_timing()
    assert loop.passes == loop.decoded == 0


def test_silence_of_a_source_shows_in_the_state_without_any_frame():
    aligner = Aligner(["head"], max_age=0.1)
    loop = InferenceLoop(aligner.align, answer, lambda chunk: None, 10.0)
    loop.start()
    try:
        aligner.add_joints(JointState(1, ("a",), [0.0]), time.monotonic_ns())
        aligner.set_instruction("go")
        aligner.add_frame("head", Frame(1, time.monotonic_ns(), lambda: np.zeros((1, 1, 3), np.uint8)))
        end = time.monotonic() + 3.0
        while loop.state.readiness is not Readiness.STALE and time.monotonic() < end:
            time.sleep(0.05)
        assert "camera head silent" in loop.state.reason
    finally:
        loop.stop()


def test_a_chunk_for_an_instruction_that_was_changed_meanwhile_is_dropped_and_the_next_one_begun_at_once():
    aligner, chunks, seen = Aligner(["head"], max_age=60.0), [], []

    def infer(observation):
        seen.append(observation.instruction)
        aligner.set_instruction("stop")  # while the first one is being computed
        return answer(observation)

    loop = InferenceLoop(
        aligner.align, infer, chunks.append, 0.1, wanted=lambda seen: seen.instruction == aligner.instruction
    )
    aligner.add_joints(JointState(1, ("a",), [0.0]), time.monotonic_ns())
    aligner.set_instruction("go")
    aligner.add_frame("head", Frame(1, time.monotonic_ns(), lambda: np.zeros((1, 1, 3), np.uint8)))
    loop.start()
    loop.frame_arrived(time.monotonic_ns())
    end = time.monotonic() + 5.0
    while not chunks and time.monotonic() < end:
        time.sleep(0.01)
    loop.stop()
    # One frame, at a rate of one in ten seconds.
    assert seen == ["go", "stop"] and len(chunks) == 1 and loop.unwanted == 1 and loop.busy_since_ns is None


def test_frames_pass_by_until_an_inference_may_begin():
    source, chunks = Source(), []
    loop = InferenceLoop(source.align, answer, chunks.append, 1000.0, due=lambda seen: seen.stamp_ns >= 5)
    loop.start()
    end = time.monotonic() + 5.0
    while not chunks and time.monotonic() < end:
        source.send(loop)
        time.sleep(0.005)
    loop.stop()
    assert chunks[0].stamp_ns >= 5
