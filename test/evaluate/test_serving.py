from __future__ import annotations

import numpy as np
import pytest
from conftest import JOINTS, recording

from vla_edge.evaluate.control_replay import CONTROL_HZ, ControlReplay
from vla_edge.evaluate.read_ahead import ahead
from vla_edge.evaluate.replay import evaluate_bag
from vla_edge.evaluate.serving import ServingTally, VirtualServer
from vla_edge.robots.g1 import g1
from vla_edge.types import ActionChunk, JointState

MS = 1_000_000


def served(latency_ms, stamps_ms):
    server, found = VirtualServer(), []
    for stamp in stamps_ms:
        found += server.offer(stamp * MS, latency_ms * MS)
    return [(done.stamp_ns // MS, done.done_ns // MS) for done in (*found, *server.flush())]


def test_an_engine_faster_than_its_observations_serves_each():
    assert served(50, range(0, 1000, 200)) == [(t, t + 50) for t in range(0, 1000, 200)]


def test_a_slow_engine_takes_the_newest_when_it_is_free_and_leaves_the_others():
    # at 500 ms it is free and takes the observation of 400, at 1000 that of 1000
    assert served(500, range(0, 1400, 200)) == [(0, 500), (400, 1000), (1000, 1500), (1200, 2000)]


def test_nothing_is_late_across_a_pause():
    assert served(500, [0, 200, 5000]) == [(0, 500), (200, 1000), (5000, 5500)]


@pytest.mark.parametrize(("latency", "share", "rate", "stale"), [(0.05, 1.0, 5.0, 250), (0.5, 0.4, 2.0, 1000)])
def test_rate_and_staleness_follow_from_latency(latency, share, rate, stale):
    tally = ServingTally()
    for k in range(100):
        tally.add(k * 200 * MS, latency)
    found = tally.summary()
    assert found.served_fraction == pytest.approx(share, abs=0.02) and found.rate_hz == pytest.approx(rate, abs=0.05)
    # just before the next chunk is there
    assert found.staleness_ms.p50 == pytest.approx(stale, abs=110)


def chunk(stamp_ns, start, speed, points=16):
    steps = (np.arange(points) + 1)[:, None] * 0.05
    return ActionChunk(stamp_ns, JOINTS, start + steps * speed, 0.05)


def driven(speed, delay_s=0.1, frames=25, period_ms=200, offset=0.0):
    replay = ControlReplay(g1(), JOINTS, delay_s)
    for k in range(frames):
        stamp = (1000 + k * period_ms) * MS
        at = np.array([0.2, 0.2, 0.0]) + speed * k * period_ms / 1000
        replay.add(chunk(stamp, at + offset, np.full(3, speed)), JointState(stamp, JOINTS, at))
    return replay.summary()


def test_chunks_that_agree_are_all_followed_smoothly():
    found = driven(speed=0.1)
    assert (found.accepted, found.rejected, found.limit_hits, found.holds) == (25, {}, 0, 0)
    # from the first observation to the last chunk
    assert found.steps == pytest.approx((24 * 0.2 + 0.1) * CONTROL_HZ, abs=2)
    assert 0 < found.jerk_rms < driven(speed=0.3).jerk_rms


def test_chunks_too_far_away_are_refused_with_the_reason_and_counted():
    found = driven(speed=0.0, offset=1.0)
    assert found.accepted == 0 and found.rejected["first_step"] > 0 and found.rejected_fraction == 1.0


def test_chunks_that_come_too_late_leave_the_controller_without():
    found = driven(speed=0.05, delay_s=0.7, frames=40)
    assert found.holds > 5 and 5 < found.accepted < 20
    # beyond their horizon they are of no use at all
    assert set(driven(speed=0.05, delay_s=1.5, frames=40).rejected) == {"stale"}


def test_a_pause_of_the_recording_is_not_held_against_the_engine():
    replay = ControlReplay(g1(), JOINTS, 0.1)
    for stamp in (1000, 1200, 60_000, 60_200):
        # the robot is elsewhere after the pause
        at = np.full(3, 0.1 if stamp < 2000 else 0.9)
        replay.add(chunk(stamp * MS, at, np.zeros(3)), JointState(stamp * MS, JOINTS, at))
    found = replay.summary()
    assert (found.accepted, found.rejected, found.holds) == (4, {}, 0)


def test_control_is_the_same_on_every_run_and_with_full_precision_beside(make_bag, oracle):
    first, second = (evaluate_bag(make_bag(f"bag{i}", recording()), oracle(sigma=0.01), oracle()) for i in range(2))
    assert first.control == second.control and first.reference_control.jerk_rms < first.control.jerk_rms
    slow = evaluate_bag(make_bag("slow", recording()), oracle(), delay_s=0.6)
    assert slow.control.accepted < first.control.accepted


def test_reading_ahead_changes_nothing_but_the_thread():
    assert list(ahead(iter(range(100)))) == list(range(100))

    def failing():
        yield 1
        raise KeyError("half way")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(KeyError):
        next(items)


def test_reading_ahead_ends_its_reader_when_left_early():
    import threading

    before, made = threading.active_count(), []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    items = ahead(endless(), depth=2)
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before and len(made) <= 5
