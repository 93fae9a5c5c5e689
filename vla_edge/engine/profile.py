"""Where an inference spends its time, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_edge.types import Observation

PERCENTILES = (50, 95, 99)


def profile(runner, observations: Sequence[Observation], repeats: int = 30) -> dict[str, dict[str, float]]:
    """Part of an inference -> {"p50", "p95", "p99"} ms and n, over `repeats` inferences after a warm-up.

    Parts are preprocess, each stage (all its calls), postprocess and total.
    """
    runner.warm_up()
    rows: dict[str, list[float]] = {}
    for index in range(repeats):
        timing = runner.infer(observations[index % len(observations)]).timing
        parts = {"preprocess": timing.preprocess, **timing.stages, "postprocess": timing.postprocess}
        for name, seconds in {**parts, "total": timing.total}.items():
            rows.setdefault(name, []).append(1e3 * seconds)
    return {name: summary(milliseconds) for name, milliseconds in rows.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and n of `values`."""
    points = np.percentile(values, PERCENTILES)
    return {**{f"p{p}": round(float(point), 3) for p, point in zip(PERCENTILES, points)}, "n": len(values)}
