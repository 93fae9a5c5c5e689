"""An engine behind a policy: what runs is remembered as the robot carries it out, and the delay is measured."""

from __future__ import annotations

import numpy as np
import pytest
from fake_engine import DT, ROWS, FakeEngine, ns, observation, ramp

from vla_edge.serve.plan import positions_at
from vla_edge.serve.policies import make_policy
from vla_edge.serve.server import ChunkServer


def serve(server: ChunkServer, seconds: float, delay: float, position=None, instruction: str = "go"):
    """One inference; the robot is where its plan says unless told otherwise."""
    if position is None:
        running = server.running
        position = (0.0, 0.0) if running is None else positions_at(running, np.array([ns(seconds)]))[0]
    chunk, _ = server.infer(observation(seconds, position, instruction))
    return server.deliver(chunk, ns(seconds + delay))


def test_the_delay_is_what_passed_between_stamp_and_delivery():
    server = ChunkServer(FakeEngine(), make_policy("asynchronous"))
    for i, delay in enumerate((0.1, 0.2, 0.4)):
        serve(server, 0.5 * i, delay)
    assert server.delay.summary().p95 == pytest.approx(np.percentile([0.1, 0.2, 0.4], 95))


def test_a_robot_that_stood_begins_a_late_chunk_at_its_beginning():
    server = ChunkServer(FakeEngine(), make_policy("asynchronous"))
    first = serve(server, 1.0, 0.3)
    assert first.stamp_ns == ns(1.0) and server.running.stamp_ns == ns(1.3)
    # It moves from 1.3 s on, so the next one is entered at its age.
    second = serve(server, 1.5, 0.3)
    assert second.stamp_ns == server.running.stamp_ns == ns(1.5)
    # The plan is over at 2.5 s, and the controller holds from 2.6 s on.
    serve(server, 2.2, 0.7)
    assert server.running.stamp_ns == ns(2.2 + 0.3)


def test_a_plan_is_continued_where_the_robot_is_along_it():
    engine = FakeEngine()
    server = ChunkServer(engine, make_policy("real_time_chunking"))
    serve(server, 1.0, 0.3)
    serve(server, 1.5, 0.3)
    continuation = engine.asked[1][1]
    # Moving since 1.3 s at 0.5 rad/s: at 1.55 s, the moment of the first row, it will be at 0.125 rad.
    np.testing.assert_allclose(continuation.positions[0], 0.125)
    assert np.count_nonzero(continuation.weights == 1.0) == 6


@pytest.mark.parametrize("why", ["moved by hand", "over", "clock set back", "begun anew"])
def test_nothing_is_continued_that_the_robot_does_not_follow(why):
    engine = FakeEngine()
    server = ChunkServer(engine, make_policy("real_time_chunking"))
    serve(server, 1.0, 0.1)
    if why == "begun anew":
        server.forget()
    serve(server, {"over": 2.5, "clock set back": 0.5}.get(why, 1.4), 0.1, (0.9, 0.0) if why == "moved by hand" else None)
    assert engine.asked[1][1] is None


def test_chunks_for_another_instruction_are_not_averaged_in():
    server = ChunkServer(FakeEngine(), make_policy("temporal_ensembling"))
    serve(server, 1.0, 0.0)
    same = serve(server, 1.2, 0.0, (0.3, 0.3))
    assert np.abs(same.positions[0] - 0.325).max() > 0.05
    other = serve(server, 1.4, 0.0, (0.3, 0.3), "stop")
    np.testing.assert_array_equal(other.positions, ramp(observation(1.4, (0.3, 0.3))))


def test_a_new_instruction_does_not_wait_for_the_end_of_a_synchronous_chunk():
    server = ChunkServer(FakeEngine(), make_policy("synchronous: {execute: 0.5, settle: 0.1}"))
    assert server.due("go", ns(0.9))
    serve(server, 1.0, 0.2)  # begun at 1.2 s
    assert not server.due("go", ns(1.75)) and server.due("stop", ns(1.75)) and server.due("go", ns(1.85))


def test_engine_and_policy_are_exchanged_between_chunks_and_the_plan_goes_on():
    old, new = FakeEngine(), FakeEngine(lambda seen: ramp(seen, 0.1))
    server = ChunkServer(old, make_policy("asynchronous"))
    serve(server, 1.0, 0.4)
    chunk, _ = server.infer(observation(1.5, (0.05, 0.05)))
    server.use(new, make_policy("real_time_chunking"))
    assert server.engine is new and server.delay.summary().count == 0
    server.deliver(chunk, ns(1.9))  # placed by the policy that asked for it
    serve(server, 2.0, 0.2)
    assert len(old.asked) == 2 and new.asked[0][1] is not None


def test_the_same_calls_give_the_same_chunks():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (8, ROWS, 2))

    def run():
        answers = iter(noise)
        server = ChunkServer(FakeEngine(lambda seen: ramp(seen) + next(answers)), make_policy("temporal_ensembling"))
        return [serve(server, 1.0 + 4 * DT * i, 0.1).positions for i in range(8)]

    np.testing.assert_array_equal(run(), run())
