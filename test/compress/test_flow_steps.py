"""Which flow steps ask the network: the best of all choices, found without trying each from the beginning."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from tiny_subject import load_tiny, make_observations

from vla_edge.compress.flow_steps import best_steps
from vla_edge.compress.recipe import RecipeError
from vla_edge.engine.runner import Runner


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner.from_policy(*load_tiny(tmp_path_factory.mktemp("flow")), 6)


def test_the_choice_is_the_best_of_all(runner):
    observations = make_observations(4)

    def chunks(*evaluated):
        runner.set_num_steps(6, evaluated)
        return np.array([runner.infer(observation).chunk.positions for observation in observations])

    whole, told = chunks(), []
    errors = {(0, *rest): np.abs(chunks(0, *rest) - whole).mean() for rest in combinations(range(1, 6), 2)}
    runner.set_num_steps(6)
    found = best_steps(runner, 6, 3, observations, told.append)
    assert errors[found] == pytest.approx(min(errors.values()), rel=1e-4)
    assert errors[found] < np.median(list(errors.values()))
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert best_steps(runner, 6, 6, observations) == (0, 1, 2, 3, 4, 5) and best_steps(runner, 6, 1, observations) == (0,)


@pytest.mark.parametrize(("steps", "asked"), [(6, 7), (13, 5), (6, 0)])
def test_choices_that_cannot_be_made_are_errors(runner, steps, asked):
    with pytest.raises(RecipeError, match="at least as many"):
        best_steps(runner, steps, asked, make_observations(1))
