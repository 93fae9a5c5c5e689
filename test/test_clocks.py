"""An interruption between two clocks does not pass for a difference of the clocks."""

import time

from vla_edge.clocks import offset_ns


def test_a_reading_that_was_interrupted_does_not_count():
    calls = []

    def clock():
        now = time.monotonic_ns() + 5_000_000_000
        if not calls:
            time.sleep(0.05)  # the processor is taken away after the clock was read
        calls.append(now)
        return now

    assert abs(offset_ns(clock) - 5_000_000_000) < 5_000_000
    assert len(calls) > 1


def test_the_offset_leads_from_one_clock_to_the_other():
    assert abs(time.monotonic_ns() + offset_ns() - time.time_ns()) < 50_000_000
