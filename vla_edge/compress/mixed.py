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
    """

    options: Mapping[str, str]
    average_bits: float
    predicted_error_rel: float


def choose(found: Sensitivity, max_bits: float | None = None, max_error_rel: float | None = None) -> Choice:
    """The least error within `max_bits` per weight, or the fewest bits within `max_error_rel`; one of them is given.

    Raises:
        RecipeError: no choice keeps to the budget, or not exactly one budget is given.
    """
    if (max_bits is None) == (max_error_rel is None):
        raise RecipeError("give one budget: average bits per weight, or the error that is allowed")
    low, high = -60.0, 60.0  # logarithm of the price of a bit in squared rad: from none to any
    by_bits = max_bits is not None
    within = (lambda c: c.average_bits <= max_bits) if by_bits else (lambda c: c.predicted_error_rel <= max_error_rel)
    # a higher price gives fewer bits and more error
    feasible, other = (high, low) if by_bits else (low, high)
    best = _at(found, math.exp(feasible))
    if not within(best):
        what = f"{max_bits:g} bits" if by_bits else f"an error of {max_error_rel:g}"
        raise RecipeError(
            f"{what} cannot be kept to: the nearest is {best.average_bits:.2f} bits at an error of "
            f"{best.predicted_error_rel:.4f} of the motion; allow more"
        )
    for _ in range(60):
        middle = (feasible + other) / 2
        tried = _at(found, math.exp(middle))
        if within(tried):
            feasible, best = middle, tried
        else:
            other = middle
    return _improve(found, best, max_bits) if by_bits else best


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


def _at(found: Sensitivity, price: float) -> Choice:
    """The best choice when every bit costs `price` squared rad."""
    options = {}
    for layer, errors in found.error_rad.items():
        options[layer] = min(errors, key=lambda option: errors[option] ** 2 + price * found.bits[layer][option])
    return _choice(found, options)


def _improve(found: Sensitivity, choice: Choice, max_bits: float) -> Choice:
    """What the relaxation leaves of the budget, spent where it gains most."""
    options = dict(choice.options)
    left = max_bits * sum(found.weights.values()) - sum(found.bits[layer][o] for layer, o in options.items())
    while True:
        gains = []
        for layer, now in options.items():
            errors, bits = found.error_rad[layer], found.bits[layer]
            for option in errors:
                more, gain = bits[option] - bits[now], errors[now] ** 2 - errors[option] ** 2
                if gain > 0 and more <= left:
                    gains.append((gain / max(more, 1), layer, option, more))
        if not gains:
            return _choice(found, options)
        _, layer, option, more = max(gains)
        options[layer] = option
        left -= more


def _choice(found: Sensitivity, options: Mapping[str, str]) -> Choice:
    bits = sum(found.bits[layer][option] for layer, option in options.items())
    error = math.sqrt(sum(found.error_rad[layer][option] ** 2 for layer, option in options.items()))
    return Choice(dict(options), bits / sum(found.weights.values()), error / found.motion_std_rad)
