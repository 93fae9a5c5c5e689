"""Sensitivity is measured on the robot's motion, an interrupted measurement goes on, and budgets are kept."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny_subject import Subject, load_tiny, make_observations

from vla_edge.compress.mixed import choose, to_recipe
from vla_edge.compress.plan import plan_layers
from vla_edge.compress.recipe import Accept, RecipeError, parse_recipe
from vla_edge.compress.sensitivity import OPTIONS, Sensitivity, Trial, measure
from vla_edge.compress.steps import Quantize


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject(*load_tiny(tmp_path_factory.mktemp("tiny")))


def question(subject) -> tuple:
    weighed = subject.weighed(make_observations(6))
    return subject.stages, subject.modules, subject.runner, weighed, make_observations(3, seed=5)


@pytest.fixture(scope="module")
def found(subject):
    return measure(*question(subject))


def test_every_layer_is_measured_in_every_precision_and_the_policy_is_left_alone(subject, found):
    before = subject.chunks()
    again = measure(*question(subject))
    assert again == found
    np.testing.assert_array_equal(subject.chunks(), before)
    assert set(found.error_rad) == set(subject.modules)
    assert all(set(errors) == set(OPTIONS) for errors in found.error_rad.values())
    # every layer can be heard in the chunk, the one that feeds flow time beforehand too
    assert min(errors["int4"] for errors in found.error_rad.values()) > 0
    total = {option: sum(errors[option] for errors in found.error_rad.values()) for option in OPTIONS}
    assert total["float16"] < total["int8"] < total["int4"]


def test_the_error_is_that_of_the_chunk(subject, found):
    from vla_edge.compress.apply import compress_layer

    name, observations = "denoise.action_out", make_observations(3, seed=5)
    layer = compress_layer(name, subject.modules[name], OPTIONS["float16"])
    trial = Trial(subject.runner, subject.modules, observations)
    assert trial.error_rad({name: layer}) == pytest.approx(found.error_rad[name]["float16"])
    assert trial.error_rad({}) == 0.0


def test_an_interrupted_measurement_goes_on_and_another_question_begins_anew(subject, found, tmp_path):
    file = tmp_path / "progress.json"
    arguments = question(subject)

    class Interrupted(Exception):
        pass

    def stop(fraction, what):
        if what == "measuring prefix.layers.0.q":
            raise Interrupted

    with pytest.raises(Interrupted):
        measure(*arguments, tell=stop, progress_file=file)
    kept = json.loads(file.read_text())["values"]
    assert 0 < len(kept) < len(subject.modules) * len(OPTIONS)
    marked = {**json.loads(file.read_text()), "values": {**kept, next(iter(kept)): 42.0}}
    file.write_text(json.dumps(marked))
    again = measure(*arguments, progress_file=file)
    assert 42.0 in {error for errors in again.error_rad.values() for error in errors.values()}  # not measured twice
    other = measure(*arguments[:-1], make_observations(2, seed=6), progress_file=file)
    assert 42.0 not in {error for errors in other.error_rad.values() for error in errors.values()}
    file.write_text('{"question": 3')
    assert measure(*arguments, progress_file=file) == found


def test_options_that_are_not_about_one_layer_are_refused(subject):
    bad = {"w8a8": Quantize(("*",), "int8", "int8")}
    with pytest.raises(RecipeError, match="one layer"):
        measure(subject.stages, subject.modules, subject.runner, subject.weighed([]), make_observations(2), bad)


def toy(layers: int = 6, seed: int = 0) -> Sensitivity:
    rng = np.random.default_rng(seed)
    weights = {f"layer{i}": int(rng.integers(50, 500)) for i in range(layers)}
    errors = {name: dict(zip(OPTIONS, np.sort(rng.lognormal(-6, 1.5, 4))[::-1].tolist())) for name in weights}
    bits = {name: dict(zip(OPTIONS, (4 * n + 20, 4 * n + 40, 8 * n + 20, 16 * n))) for name, n in weights.items()}
    return Sensitivity(0.1, 1, errors, bits, weights)


def best_of_all(found: Sensitivity, max_bits: float) -> float:
    least = math.inf
    for options in itertools.product(OPTIONS, repeat=len(found.weights)):
        pairs = list(zip(found.weights, options))
        if sum(found.bits[layer][o] for layer, o in pairs) <= max_bits * sum(found.weights.values()):
            least = min(least, sum(found.error_rad[layer][o] ** 2 for layer, o in pairs))
    return math.sqrt(least) / found.motion_std_rad


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_of_bits_is_kept_and_spent_nearly_as_well_as_can_be(seed):
    found = toy(seed=seed)
    for budget in (5.0, 6.5, 9.0):
        choice = choose(found, max_bits=budget)
        assert choice.average_bits <= budget
        assert choice.predicted_error_rel <= 1.3 * best_of_all(found, budget)
    assert choose(found, max_bits=99).options == dict.fromkeys(found.weights, "float16")


def test_a_budget_of_error_takes_the_fewest_bits():
    found = toy()
    strict, loose = (choose(found, max_error_rel=limit) for limit in (0.05, 0.3))
    assert strict.predicted_error_rel <= 0.05 and loose.predicted_error_rel <= 0.3
    assert loose.average_bits < strict.average_bits


def test_a_budget_of_time_is_kept_and_counts_what_is_no_layer():
    found, rng = toy(), np.random.default_rng(3)
    times = {name: dict(zip(OPTIONS, rng.uniform(0.1, 1.0, 4).tolist())) for name in found.weights}
    found = replace(found, milliseconds=times, rest_ms=2.0)
    fastest = 2.0 + sum(min(row.values()) for row in times.values())
    errors = []
    for budget in (fastest + 0.01, fastest + 0.5, 99.0):
        choice = choose(found, max_ms=budget)
        spent = 2.0 + sum(times[layer][option] for layer, option in choice.options.items())
        assert choice.predicted_ms == pytest.approx(spent) and spent <= budget
        errors.append(choice.predicted_error_rel)
    assert errors[0] > errors[1] > errors[2] == choose(found, max_bits=99).predicted_error_rel
    with pytest.raises(RecipeError, match="ms cannot be kept to: the nearest is"):
        choose(found, max_ms=fastest - 0.01)


def test_a_budget_nothing_keeps_to_is_an_error_that_says_what_is_nearest():
    with pytest.raises(RecipeError, match="the nearest is 4"):
        choose(toy(), max_bits=3.9)
    with pytest.raises(RecipeError, match="the nearest is 4"):
        choose(toy(), max_bits=0.0)
    with pytest.raises(RecipeError, match="cannot be kept"):
        choose(toy(), max_error_rel=1e-12)
    with pytest.raises(RecipeError, match="one budget"):
        choose(toy(), max_bits=5, max_error_rel=0.1)


def test_the_choice_becomes_a_recipe_that_reads_back_and_gives_each_layer_what_was_chosen(subject, found):
    choice = choose(found, max_bits=7.0)
    assert len(set(choice.options.values())) > 1
    recipe = to_recipe(choice, "mixed", Accept(0.1, 0.9), "found by sensitivity")
    again = parse_recipe(recipe.to_dict())
    assert again == recipe == parse_recipe(recipe.concise())
    plan = plan_layers(again, list(subject.modules))
    for layer, option in choice.options.items():
        assert type(plan[layer]) is type(OPTIONS[option])
        assert getattr(plan[layer], "weights", None) == getattr(OPTIONS[option], "weights", None)
