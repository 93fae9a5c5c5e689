"""Which flow steps have to ask the network: those without which the actions change least, the others extrapolated.

Every choice of so many steps is tried on recorded observations; choices that begin alike share what they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np

from vla_edge.compress.recipe import RecipeError
from vla_edge.engine.flow_loop import extrapolation, mean_velocity
from vla_edge.types import Observation

# Beyond, there are too many choices to try: 462 of 6 in 12.
MOST_STEPS = 12
FRAMES = 24


def check(num_steps: int, evaluations: int) -> None:
    """Raises RecipeError: `evaluations` of `num_steps` cannot be chosen."""
    if not 1 <= evaluations <= num_steps <= MOST_STEPS:
        raise RecipeError(
            f"{evaluations} of {num_steps} flow steps are to ask the network; there have to be at least as many, and at "
            f"most {MOST_STEPS}: give flow_steps a num_steps"
        )


def best_steps(
    runner,
    num_steps: int,
    evaluations: int,
    observations: Sequence[Observation],
    progress: Callable[[float], None] | None = None,
) -> tuple[int, ...]:
    """The steps to ask, the first being 0.

    Args:
        runner: a `Runner` of a flow policy that takes `num_steps` steps.
        observations: some of them, spread evenly, are looked at.

    Raises:
        RecipeError: there is no such choice, or too many.
    """
    check(num_steps, evaluations)
    choices = [(0, *rest) for rest in combinations(range(1, num_steps), evaluations - 1)]
    seen = observations[:: max(1, len(observations) // FRAMES)]
    errors = np.zeros(len(choices))
    weights = np.abs(runner.spec.chunk_affine()[1])
    rows, joints = weights.shape
    conditions: dict[int, np.ndarray] = {}
    for number, observation in enumerate(seen):
        inputs = next(tensors for name, tensors in runner.stage_inputs(observation) if name == "denoise")
        shape = inputs["time_condition"].shape

        def velocity(x: np.ndarray, step: int, inputs=inputs, shape=shape) -> np.ndarray:
            if step not in conditions:
                moment = {"time": np.array([1.0 - step / num_steps], np.float32)}
                found = runner.stages["time"].run(moment)["time_condition"]
                rows = found if found.ndim == len(shape) else found[:, None]  # policies that continue: one for each row
                conditions[step] = np.array(np.broadcast_to(rows, shape))
            (found,) = runner.stages["denoise"].run({**inputs, "x": x, "time_condition": conditions[step]}).values()
            return found

        ends = dict(_ends(inputs["x"], choices, num_steps, velocity))
        (whole,) = (end for _, end in _ends(inputs["x"], [tuple(range(num_steps))], num_steps, velocity))
        for place, choice in enumerate(choices):
            errors[place] += (np.abs(ends[choice] - whole)[:, :rows, :joints] * weights).mean()
        if progress is not None:
            progress((number + 1) / len(seen))
    return choices[int(errors.argmin())]


def _ends(
    x: np.ndarray, choices: Sequence[tuple[int, ...]], num_steps: int, velocity: Callable[[np.ndarray, int], np.ndarray]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Choice -> where the flow ends up with it, from `x`; common beginnings are gone once."""

    def go(x: np.ndarray, done: tuple[int, ...], left: Sequence[tuple[int, ...]], previous):
        now = velocity(x, done[-1])
        onward: dict[int, list[tuple[int, ...]]] = {}
        for choice in left:
            onward.setdefault(choice[len(done)] if len(choice) > len(done) else num_steps, []).append(choice)
        for step, those in onward.items():
            ahead = np.float32(0) if previous is None else extrapolation(done[-1] - done[-2], step - done[-1])
            reached = x - np.float32((step - done[-1]) / num_steps) * mean_velocity(now, previous, ahead)
            if step == num_steps:
                yield those[0], reached
            else:
                yield from go(reached, (*done, step), those, now)

    yield from go(x, (0,), choices, None)
