from __future__ import annotations

import math

import pytest

from vla_edge.serve.derating import Derating, DeratingConfig, DeratingError
from vla_edge.serve.heat import Heat

CONFIG = DeratingConfig(hot=90.0, cool=80.0, slow=1.0, fast=0.8, down_after=3.0, up_after=30.0)
FINE = Heat(60.0, "cpu")


def run(derating: Derating, start: float, seconds: float, load: float, heat: Heat = FINE) -> list[int]:
    """Levels, once a second."""
    return [derating.update(start + i, load, heat) for i in range(round(seconds))]


def test_a_slow_engine_is_left_after_a_while_and_not_for_a_single_peak():
    derating = Derating(CONFIG, 3)
    assert run(derating, 0, 2, 1.4) + run(derating, 2, 1, 0.7) + run(derating, 3, 3, 1.4) == [0] * 6
    assert run(derating, 6, 1, 1.4) == [1] and derating.reason == "an inference takes 1.40 of a period"


def test_the_heavier_engine_comes_back_only_when_it_would_keep_its_rate_by_what_it_cost_more():
    derating = Derating(CONFIG, 2)
    run(derating, 0, 4, 1.5)
    assert derating.level == 1
    # The lighter one needs half the time under the same load: the heavier would still be too slow.
    assert set(run(derating, 10, 100, 0.75)) == {1}
    # The load is gone: 0.35 means 0.7 for the heavier one.
    assert run(derating, 110, 30, 0.35) == [1] * 30 and run(derating, 140, 1, 0.35) == [0]
    assert derating.reason == ""


def test_heat_steps_down_and_only_real_cooling_steps_back():
    derating = Derating(CONFIG, 2)
    run(derating, 0, 4, 0.3, Heat(95.0, "gpu"))
    assert derating.level == 1 and derating.reason == "gpu is at 95 degrees"
    assert set(run(derating, 10, 60, 0.2, Heat(85.0, "gpu"))) == {1}
    assert set(run(derating, 70, 60, 0.2, Heat(70.0, "gpu", throttled=True))) == {1}
    assert run(derating, 130, 31, 0.2, Heat(70.0, "gpu"))[-1] == 0


def test_each_step_takes_its_time_and_there_is_nothing_below_the_lightest():
    derating = Derating(CONFIG, 3)
    levels = run(derating, 0, 30, 2.0)
    assert levels[3] == 1 and levels.index(2) >= 6 and levels[-1] == 2
    assert Derating(CONFIG, 1).update(0, 9.0, FINE) == Derating(CONFIG, 1).update(99, 9.0, FINE) == 0


def test_an_engine_that_has_not_inferred_yet_is_not_judged():
    derating = Derating(CONFIG, 2)
    assert set(run(derating, 0, 60, math.nan, Heat())) == {0}


def test_an_engine_that_could_not_be_had_is_asked_for_again_after_a_while():
    derating = Derating(CONFIG, 2)
    run(derating, 0, 4, 1.5)
    derating.resume(0)
    assert derating.level == 0 and derating.reason == ""
    assert run(derating, 10, 4, 1.5) == [0, 0, 0, 1]


def test_a_load_at_the_edge_does_not_make_it_swing():
    derating, changes, level = Derating(CONFIG, 2), 0, 0
    for second in range(600):
        # 10 % over the period with the heavy engine, half of that with the light one
        now = derating.update(second, 1.1 if level == 0 else 0.55, FINE)
        changes, level = changes + (now != level), now
    assert changes == 1


@pytest.mark.parametrize("numbers", [{"cool": 95.0}, {"fast": 1.0}])
def test_numbers_that_would_make_it_swing_are_refused(numbers):
    with pytest.raises(DeratingError, match="without end"):
        DeratingConfig(**numbers)
