"""Percentiles are those of the latest values."""

from __future__ import annotations

import math

import numpy as np

from vla_edge.serve.latency import RollingLatency, StageLatencies


def test_percentiles_are_those_of_the_window():
    values = np.random.default_rng(0).exponential(0.01, 500)
    latency = RollingLatency(window=200)
    for value in values:
        latency.add(value)
    summary = latency.summary()
    assert summary.count == 500 and summary.maximum == values[-200:].max()
    np.testing.assert_allclose((summary.p50, summary.p95, summary.p99), np.percentile(values[-200:], (50, 95, 99)))


def test_nothing_measured_is_not_a_number():
    assert math.isnan(RollingLatency().summary().p99)


def test_stages_keep_their_order():
    stages = StageLatencies()
    for stage in ("vision", "prefix", "denoise", "vision"):
        stages.add(stage, 1.0)
    assert list(stages.summaries()) == ["vision", "prefix", "denoise"]
    assert stages.summaries()["vision"].count == 2
