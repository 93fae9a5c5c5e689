"""Layers timed alone: every call of a chunk is counted, and more work takes longer."""

from __future__ import annotations

import pytest
from torch import nn

from vla_edge.compress.sensitivity import FAST_OPTIONS
from vla_edge.engine.layer_latency import measure_layers


class Runner:
    """Shows a layer `calls` times to `rows` rows."""

    def __init__(self, *plan):
        self.plan = plan

    def infer(self, observation):
        import torch

        for layer, rows, calls in self.plan:
            for _ in range(calls):
                layer(torch.zeros(1, rows, layer.in_features))


@pytest.fixture(scope="module")
def found():
    small, large, often, never = nn.Linear(64, 64), nn.Linear(512, 1024), nn.Linear(512, 1024), nn.Linear(64, 64)
    modules = {"small": small, "large": large, "often": often, "never": never}
    return measure_layers(modules, Runner((small, 4, 1), (large, 64, 1), (often, 64, 10)), None, 1e6, FAST_OPTIONS)


def test_every_precision_of_every_layer_is_timed(found):
    assert all(list(row) == list(FAST_OPTIONS) for row in found.milliseconds.values())
    assert all(value > 0 for value in found.milliseconds["large"].values())


def test_more_work_takes_longer_and_equal_layers_are_timed_once(found):
    times = {name: row["float32"] for name, row in found.milliseconds.items()}
    assert times["large"] > 3 * times["small"]
    assert times["often"] == pytest.approx(10 * times["large"]), "one measurement serves both"
    assert times["never"] == 0.0


def test_what_is_no_layer_is_the_rest_of_the_whole(found):
    assert found.rest_ms == pytest.approx(1e6 - sum(row["float32"] for row in found.milliseconds.values()))
