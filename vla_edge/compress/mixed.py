"""Sensitivity + a budget -> which layer gets which precision, as a recipe.

Errors of single layers are taken to be independent, so that their squares add up; what the whole then really errs is
measured afterwards. Under that assumption the choice is a knapsack with a convex relaxation, solved by its multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vla_edge.compress.recipe import Accept, Recipe, RecipeError
from vla_edge.compress.sensitivity import OPTIONS, Sensitivity
from vla_edge.compress.steps import Storage


@dataclass(frozen=True)
class Choice:
    """A precision for each layer.

    Attributes:
        options: layer -> name of its option.
        average_bits: per weight, scales included.
        predicted_error_rel: of the chunks over the standard deviation of the motion.
        predicted_ms: of a chunk, where the layers were timed.
    """

    options: Mapping[str, str]
    average_bits: float
    predicted_error_rel: float
    predicted_ms: float | None = None


@dataclass(frozen=True)
class Measured:
    """What the whole choice does, beside what was predicted from layers one by one.

    Attributes:
        error_rel: action error over the standard deviation of the motion, on observations the search fitted nothing to.
        ms: of a chunk on this machine, where the budget is one of time.
    """

    error_rel: float
    ms: float | None = None


def choose(
    found: Sensitivity,
    max_bits: float | None = None,
    max_error_rel: float | None = None,
    max_ms: float | None = None,
) -> Choice:
    """The least error within `max_bits` per weight or `max_ms` of a chunk, or the fewest bits within `max_error_rel`.

    Args:
        found: with `milliseconds` where the budget is one of time. Of the budgets one is given.

    Raises:
        RecipeError: no choice keeps to the budget, or not exactly one budget is given.
    """
    if [max_bits, max_error_rel, max_ms].count(None) != 2:
        raise RecipeError("give one budget: average bits per weight, milliseconds, or the error that is allowed")
    low, high = -60.0, 60.0  # logarithm of the price of a bit, or a millisecond, in squared rad: from none to any
    costs, budget = found.bits, None
    if max_bits is not None:
        what, budget = f"{max_bits:g} bits", max_bits * sum(found.weights.values())
    elif max_ms is not None:
        what, costs, budget = f"{max_ms:g} ms", found.milliseconds, max_ms - found.rest_ms
    else:
        what = f"an error of {max_error_rel:g}"

    def within(choice: Choice) -> bool:
        if budget is None:
            return choice.predicted_error_rel <= max_error_rel
        return sum(costs[layer][option] for layer, option in choice.options.items()) <= budget

    # a higher price gives less cost and more error
    feasible, other = (low, high) if budget is None else (high, low)
    best = _at(found, costs, math.exp(feasible))
    if not within(best):
        time = "" if best.predicted_ms is None else f", {best.predicted_ms:.2f} ms"
        raise RecipeError(
            f"{what} cannot be kept to: the nearest is {best.average_bits:.2f} bits{time} at an error of "
            f"{best.predicted_error_rel:.4f} of the motion; allow more"
        )
    for _ in range(60):
        middle = (feasible + other) / 2
        tried = _at(found, costs, math.exp(middle))
        if within(tried):
            feasible, best = middle, tried
        else:
            other = middle
    return best if budget is None else _improve(found, best, costs, budget)


def to_recipe(
    choice: Choice, name: str, accept: Accept, description: str, options: Mapping[str, Storage] = OPTIONS
) -> Recipe:
    """One step for each option that was chosen; its targets are layers, or stages of which it has every layer."""
    stages: dict[str, dict[str, list[str]]] = {}
    for layer, option in choice.options.items():
        stages.setdefault(layer.split(".")[0], {}).setdefault(option, []).append(layer)
    steps = []
    for option, step in options.items():
        targets: list[str] = []
        for stage, layers in stages.items():
            targets += [stage] if set(layers) == {option} else layers.get(option, [])
        if targets:
            steps.append(replace(step, targets=tuple(targets)))
    return Recipe(name, tuple(steps), accept, description)


def _at(found: Sensitivity, costs: Mapping[str, Mapping[str, float]], price: float) -> Choice:
    """The best choice when every unit of cost costs `price` squared rad."""
    options = {}
    for layer, errors in found.error_rad.items():
        options[layer] = min(errors, key=lambda option: errors[option] ** 2 + price * costs[layer][option])
    return _choice(found, options)


def _improve(found: Sensitivity, choice: Choice, costs: Mapping[str, Mapping[str, float]], budget: float) -> Choice:
    """What the relaxation leaves of the budget, spent where it gains most."""
    options = dict(choice.options)
    left = budget - sum(costs[layer][option] for layer, option in options.items())
    while True:
        gains = []
        for layer, now in options.items():
            errors, cost = found.error_rad[layer], costs[layer]
            for option in errors:
                more, gain = cost[option] - cost[now], errors[now] ** 2 - errors[option] ** 2
                if gain > 0 and more <= left:
                    gains.append((gain / more if more > 0 else math.inf, layer, option, more))
        if not gains:
            return _choice(found, options)
        _, layer, option, more = max(gains)
        options[layer] = option
        left -= more


def _choice(found: Sensitivity, options: Mapping[str, str]) -> Choice:
    bits = sum(found.bits[layer][option] for layer, option in options.items())
    error = math.sqrt(sum(found.error_rad[layer][option] ** 2 for layer, option in options.items()))
    ms = None
    if found.milliseconds is not None:
        ms = found.rest_ms + sum(found.milliseconds[layer][option] for layer, option in options.items())
    return Choice(dict(options), bits / sum(found.weights.values()), error / found.motion_std_rad, ms)
