"""The search for a target, without building: what is tried next, what is kept, when it ends and what it says then."""

from __future__ import annotations

import pytest

from vla_edge.compress.recipe import parse_recipe
from vla_edge.compress.steps import FewSteps, FlowSteps, KVCache, PruneTokens, Quantize
from vla_edge.engine.bottleneck import (
    FLOW_STEPS,
    HOST,
    LESS_BITS,
    LESS_CACHE,
    LESS_PRODUCTS,
    LESS_STEPS,
    LESS_TOKENS,
    LEVERS,
    MEMORY,
    MOVES,
    WEIGHTS,
)
from vla_edge.engine.target import Attempt, Draft, Target, TargetError, moved, pursue

MS = {"fp32": 100.0, "int8": 50.0, "int4-awq": 40.0, "int4-gptq": 38.0}
ERROR = {"fp32": 0.0, "int8": 0.01, "int4-awq": 0.02, "int4-gptq": 0.05}
MEGABYTES = {"fp32": 400, "int8": 250, "int4-awq": 200, "int4-gptq": 180}


def world(bottleneck=WEIGHTS, failing=(), error_of_steps=0.04):
    """attempt(draft, because) of an engine whose time is half flow steps, and the drafts that were asked for."""
    asked = []

    def attempt(draft: Draft, because: str) -> Attempt:
        asked.append(draft)
        if draft.precision in failing:
            return Attempt(draft, because, failure="no such products here")
        steps = draft.flow_steps or 10
        ms = MS[draft.precision] * (0.5 + 0.05 * steps) * (0.5 + 0.5 * draft.keep_vision)
        error = ERROR[draft.precision] + error_of_steps * (10 - steps) / 10 + 0.1 * (1 - draft.keep_vision)
        return Attempt(draft, because, ms, 1.1 * ms, error, 1e6 * MEGABYTES[draft.precision], 1, bottleneck)

    return attempt, asked


def test_every_bottleneck_has_a_lever_and_moves_that_exist():
    assert LEVERS.keys() == MOVES.keys()
    known = {LESS_BITS, LESS_CACHE, LESS_PRODUCTS, LESS_STEPS, LESS_TOKENS}
    assert all(moves and known.issuperset(moves) and len(set(moves)) == len(moves) for moves in MOVES.values())
    first = {FLOW_STEPS: LESS_STEPS, WEIGHTS: LESS_BITS, "attention": LESS_TOKENS, "kv cache": LESS_CACHE}
    assert all(MOVES[label][0] == move for label, move in first.items())


def test_full_precision_is_kept_where_it_is_enough():
    attempt, asked = world()
    outcome = pursue(Target(rate_hz=9), 10, attempt)
    assert outcome.reached and outcome.best.draft == Draft() and len(asked) == 1


def test_bits_are_taken_one_after_the_other_until_the_rate_is_there():
    attempt, asked = world()
    outcome = pursue(Target(rate_hz=20), 10, attempt)
    assert [draft.name for draft in asked] == ["fp32", "int8", "int4-awq"]
    assert outcome.reached and outcome.best.rate_hz >= 20 and not outcome.lever


def test_what_errs_too_much_is_left_and_another_lever_is_pulled():
    attempt, asked = world(error_of_steps=0.01)
    dropped = []
    outcome = pursue(Target(rate_hz=30, action_error_rel=0.028), 10, attempt, dropped.append)
    names = [draft.name for draft in asked]
    assert names == ["fp32", "int8", "int4-awq", "int4-gptq", "int4-awq-5steps"]
    assert outcome.reached and outcome.best.draft.name == "int4-awq-5steps"
    assert [loser.draft.name for loser in dropped] == ["fp32", "int8", "int4-gptq", "int4-awq"]
    assert outcome.attempts[3].because == WEIGHTS


def test_flow_steps_come_first_where_they_hold_it_back():
    attempt, asked = world(FLOW_STEPS, error_of_steps=0.01)
    pursue(Target(rate_hz=18), 10, attempt)
    assert [draft.name for draft in asked][:4] == ["fp32", "fp32-5steps", "fp32-2steps", "fp32-1steps"]


def test_what_is_out_of_reach_ends_with_the_bottleneck_and_a_lever():
    attempt, asked = world()
    outcome = pursue(Target(rate_hz=1000), 10, attempt, most=50)
    assert not outcome.reached and outcome.bottleneck == WEIGHTS and outcome.lever == LEVERS[WEIGHTS]
    assert outcome.best.draft.name == "int4-awq", "more would err too much"
    assert len(set(asked)) == len(asked) == len(outcome.attempts) < 50
    assert len(pursue(Target(rate_hz=1000), 10, attempt, most=3).attempts) == 3


def test_an_engine_that_cannot_be_built_is_passed_over():
    attempt, _ = world(failing=("int8",))
    outcome = pursue(Target(rate_hz=20), 10, attempt)
    assert outcome.reached and outcome.best.draft.precision == "int4-awq"
    assert outcome.attempts[1].failure == "no such products here"
    nothing = pursue(Target(rate_hz=20), 10, world(failing=MS)[0])
    assert not nothing.reached and nothing.best is None and nothing.bottleneck == MEMORY


def test_memory_is_what_holds_back_where_it_misses_most():
    attempt, asked = world(HOST)
    outcome = pursue(Target(rate_hz=9, memory_bytes=260e6), 10, attempt)
    assert outcome.reached and outcome.best.draft.precision == "int8"
    assert outcome.attempts[1].because == MEMORY


def test_an_error_that_is_no_number_is_no_gain():
    def attempt(draft, because):
        return Attempt(draft, because, 1.0, 1.0, float("nan"), 1, 1, WEIGHTS)

    assert pursue(Target(rate_hz=1), 10, attempt, most=2).best is None


def test_moves_take_one_more_step_from_where_the_draft_is():
    draft = Draft("int8", 5, 0.75, 8)
    assert [d.precision for d in moved(draft, LESS_BITS, 10)] == ["int4-awq", "int4-gptq"]
    assert [d.flow_steps for d in moved(draft, LESS_STEPS, 10)] == [2]
    assert [d.keep_vision for d in moved(draft, LESS_TOKENS, 10)] == [0.5]
    assert [d.cache_bits for d in moved(draft, LESS_CACHE, 10)] == [4]
    assert not list(moved(draft, LESS_PRODUCTS, 10)) and not list(moved(Draft(flow_steps=1), LESS_STEPS, 10))


def test_a_draft_is_a_recipe_that_parses():
    draft = Draft("int8", 5, 0.75, 4)
    recipe = draft.recipe()
    assert parse_recipe(recipe.to_dict()) == recipe and recipe.name == "int8-5steps-75tokens-kv4"
    kinds = [type(step) for step in recipe.steps]
    assert kinds[:2] == [FlowSteps, PruneTokens] and kinds[-1] is KVCache and Quantize in kinds
    assert not recipe.trains and draft.recipe(trains=True).trains
    assert FewSteps in [type(step) for step in draft.recipe(trains=True).steps]


@pytest.mark.parametrize("wrong", [{}, {"rate_hz": 0}, {"rate_hz": 5, "action_error_rel": 0}, {"memory_bytes": -1}])
def test_targets_that_mean_nothing_are_errors(wrong):
    with pytest.raises(TargetError):
        Target(**wrong)
