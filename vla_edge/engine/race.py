"""Fair timing of several engines: the same observations, in turn, so that other load on the machine meets all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vla_edge.engine.profile import summary
from vla_edge.types import Observation

RESAMPLES = 2000
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lap:
    """The inferences of one engine.

    Attributes:
        total_ms: (n,) whole inferences, in the order they were run.
        stage_ms: stage -> (n,).
    """

    total_ms: np.ndarray
    stage_ms: Mapping[str, np.ndarray]

    def to_dict(self) -> dict:
        """Percentiles, plain types."""
        rows = {"total": self.total_ms, **self.stage_ms}
        return {name: summary(values) for name, values in rows.items()}


def take_turns(
    calls: Mapping[str, Callable[[int], Result]],
    rounds: int,
    progress: Callable[[float], None] | None = None,
    rest: float = 0.0,
) -> dict[str, list[Result]]:
    """What each call gives, `rounds` times in turn, in an order drawn anew for each round; a call is told the round.

    Before each that counts its call is made once for nothing: thread pools that still spin after another's turn have
    mostly calmed down by then. Always behind the same one, an engine of 5 ms came out 4 % behind its own copy. Where
    they spin for longer than a call takes, `rest` seconds go by before.
    """
    results: dict[str, list[Result]] = {name: [] for name in calls}
    chance = random.Random(0)
    for index in range(rounds):
        for name in chance.sample(list(calls), len(calls)):
            time.sleep(rest)
            calls[name](index)
            results[name].append(calls[name](index))
        if progress is not None:
            progress((index + 1) / rounds)
    return results


def race(
    runners: Mapping[str, object],
    observations: Sequence[Observation],
    rounds: int = 30,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Lap]:
    """Time whole inferences of each runner, `rounds` times in turn."""
    for runner in runners.values():
        runner.warm_up()

    def lap(runner):
        return lambda index: runner.infer(observations[index % len(observations)]).timing

    timings = take_turns({name: lap(runner) for name, runner in runners.items()}, rounds, progress)
    return {
        name: Lap(
            1e3 * np.array([timing.total for timing in laps]),
            {stage: 1e3 * np.array([timing.stages[stage] for timing in laps]) for stage in laps[0].stages},
        )
        for name, laps in timings.items()
    }


def speedup(slow: np.ndarray, fast: np.ndarray, confidence: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Ratio of median times of two series taken in turn, and its bootstrap interval over rounds (pairs stay pairs)."""
    slow, fast = np.asarray(slow), np.asarray(fast)
    picks = np.random.default_rng(0).integers(0, len(slow), (RESAMPLES, len(slow)))
    ratios = np.median(slow[picks], axis=1) / np.median(fast[picks], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(np.median(slow) / np.median(fast)), (float(low), float(high))
