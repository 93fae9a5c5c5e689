"""The rate a demonstration reports cannot hide a silence."""

import pytest

from vla_edge.nodes.demo_monitor import Serving


def serving(begin, end, *arrivals):
    return Serving(begin, end, list(arrivals))


def test_steady_chunks_have_their_rate_wherever_the_stretch_begins_and_ends():
    for begin, end in ((0.9, 2.1), (1.0, 2.0), (0.85, 2.15)):
        periods, seconds = serving(begin, end, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0).rate()
        assert periods / seconds == pytest.approx(5.0)


def test_an_engine_that_falls_silent_is_slow():
    periods, seconds = serving(0.9, 5.0, 1.0, 1.2, 1.4).rate()
    assert periods / seconds == pytest.approx(2 / (0.4 + 3.6 - 0.2))


def test_an_engine_that_begins_late_is_slow():
    periods, seconds = serving(0.0, 4.4, 4.0, 4.2, 4.4).rate()
    assert periods / seconds == pytest.approx(2 / (0.4 + 4.0 - 0.2))


def test_a_stretch_without_chunks_counts_in_full():
    assert serving(1.0, 4.0).rate() == (0, 3.0)
    assert serving(1.0, 4.0, 2.0).rate() == (0, 3.0)
