"""Timings are taken in turn, and their ratio comes with an interval."""

from __future__ import annotations

import numpy as np
import pytest

from vla_edge.engine.profile import profile
from vla_edge.engine.race import race, speedup
from vla_edge.engine.runner import Inference
from vla_edge.types import InferenceTiming


class Clocked:
    """Pretends to have taken `seconds`."""

    def __init__(self, name: str, seconds: float, log: list):
        self._name, self._seconds, self._log = name, seconds, log

    def warm_up(self) -> None:
        self._log.append(f"{self._name} warm-up")

    def infer(self, observation):
        self._log.append(self._name)
        return Inference(None, InferenceTiming(0.001, {"vision": self._seconds}, 0.002, self._seconds + 0.003))


def test_engines_take_turns_and_calm_down_before_they_are_timed():
    log: list[str] = []
    laps = race({"a": Clocked("a", 0.02, log), "b": Clocked("b", 0.01, log)}, [None], rounds=8)
    assert log[:2] == ["a warm-up", "b warm-up"]
    rounds = {"".join(log[begin : begin + 4]) for begin in range(2, len(log), 4)}
    assert len(log) == 2 + 8 * 4 and rounds == {"aabb", "bbaa"}  # none always behind the other
    np.testing.assert_allclose(laps["a"].total_ms, [23.0] * 8)
    np.testing.assert_allclose(laps["b"].stage_ms["vision"], [10.0] * 8)
    assert laps["a"].to_dict()["total"] == {"p50": 23.0, "p95": 23.0, "p99": 23.0, "n": 8}


def test_a_speedup_is_the_ratio_of_medians_within_its_interval():
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 0.3, 400)  # other work on the machine slows both down alike
    ratio, (low, high) = speedup(30 * load, 10 * load * rng.normal(1, 0.02, 400))
    assert low <= ratio <= high and ratio == pytest.approx(3, rel=0.03)
    assert low < 3 < high and high - low < 0.3


def test_a_profile_covers_every_part():
    rows = profile(Clocked("a", 0.004, []), [None, None], repeats=5)
    assert rows["vision"] == {"p50": 4.0, "p95": 4.0, "p99": 4.0, "n": 5}
    assert set(rows) == {"preprocess", "vision", "postprocess", "total"}
