from __future__ import annotations

import functools

import numpy as np
import pytest
from test_closed_loop import SliderRig, obedient, stubborn

from vla_edge.evaluate.closed_loop import ClosedLoopError, run_closed_loop
from vla_edge.evaluate.paired_run import run_paired
from vla_edge.evaluate.sequential import Answer, SequentialMean


def answers(rate, limit, runs, length, seed=0):
    """(answer, observations it took) of every run."""
    draws = np.random.default_rng(seed).random((runs, length)) < rate
    found = []
    for row in draws:
        watch, answer = SequentialMean(limit), None
        for value in row:
            answer = watch.add(value)
            if answer is not None:
                break
        found.append((answer, watch.n))
    return found


def test_at_the_limit_itself_it_is_rarely_certain_however_often_it_looks():
    # 5 % may err; a test that looked 400 times at a fixed 95 % would err in about a third of the runs
    wrong = sum(answer is not None for answer, _ in answers(0.9, 0.9, 400, 400))
    assert wrong <= 0.05 * 400 + 3 * np.sqrt(400 * 0.05 * 0.95)


@pytest.mark.parametrize(("rate", "right"), [(0.99, Answer.ABOVE), (0.7, Answer.BELOW)])
def test_away_from_the_limit_it_is_soon_certain_and_right(rate, right):
    found = answers(rate, 0.9, 50, 1000)
    assert [answer for answer, _ in found].count(right) >= 48
    assert np.median([n for _, n in found]) < 150


def test_the_further_away_the_sooner():
    took = [np.median([n for _, n in answers(rate, 0.9, 30, 2000)]) for rate in (0.8, 0.6, 0.3)]
    assert took[0] > took[1] > took[2]


def test_a_bettor_s_wealth_is_the_product_of_its_bets():
    watch, values = SequentialMean(0.4), np.random.default_rng(0).random(30)
    for value in values:
        watch.add(value)
    bet = watch._bets[Answer.ABOVE][17]
    assert watch._wealth[Answer.ABOVE][17] == pytest.approx(np.log(np.prod(1 + bet * (values - 0.4))))
    # nobody can lose more than there is
    assert (watch._bets[Answer.ABOVE] * 0.4 < 1).all() and (-watch._bets[Answer.BELOW] * 0.6 < 1).all()


def test_what_is_no_observation_is_refused():
    with pytest.raises(ValueError):
        SequentialMean(1.0)
    with pytest.raises(ValueError):
        SequentialMean(0.5).add(1.5)


def test_a_run_ends_with_the_episode_that_makes_it_certain():
    watch = SequentialMean(0.5)
    found = run_closed_loop(obedient, range(100), rig=SliderRig, until=lambda row: watch.add(row.success) is not None)
    assert watch.answer is Answer.ABOVE and found.n == watch.n < 20
    assert [row.seed for row in found.rows] == list(range(found.n))


def test_a_pair_stops_when_it_is_certain_that_too_much_is_lost():
    found = run_paired(obedient, stubborn, range(300), margin=0.05, rig=SliderRig)
    assert found.holds is False and found.first.n == found.second.n < 100
    assert found.test.only_first == found.second.n - found.second.successes and found.test.only_second == 0
    assert "more than 5 points are lost" in found.one_line()


def test_equals_are_told_apart_from_a_margin_after_enough_pairs():
    same = functools.partial(obedient)
    found = run_paired(obedient, same, range(300), margin=0.1, rig=SliderRig)
    assert found.holds is True and found.first.n < 300
    assert run_paired(obedient, same, range(10), margin=0.01, rig=SliderRig).holds is None


def test_a_paired_run_without_seeds_or_margin_is_refused():
    with pytest.raises(ClosedLoopError):
        run_paired(obedient, obedient, [], rig=SliderRig)
    with pytest.raises(ClosedLoopError):
        run_paired(obedient, obedient, [1], margin=0.0, rig=SliderRig)
