"""A layer that computes something else is found by name, and the one before it is not blamed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy import compressed, even_stage, interface

from vla_edge.compress.recipe import Accept
from vla_edge.engine.diverge import first_divergence, layer_errors
from vla_edge.engine.export import export_stage, trace
from vla_edge.engine.verify import Verification, VerifyError, check, first_diverging_stage

INPUTS = {"x": np.random.default_rng(0).normal(size=(1, 8, 64)).astype(np.float32)}


@pytest.fixture(scope="module")
def even():
    stage = even_stage()
    return stage, trace(stage)


def errors(even, tmp_path, layers, backend="onnxruntime"):
    stage, graph = even
    file = export_stage(stage, layers, tmp_path / "even.onnx", graph)
    return layer_errors(stage.module, file, graph, interface(stage), backend, {}, INPUTS, tmp_path)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_the_layer_that_was_spoiled_is_found_and_errors_pass_on(even, tmp_path, backend):
    layers = compressed(even[0], "int8")
    found = errors(even, tmp_path, layers, backend)
    assert list(found) == ["layers.up", "layers.down"] and max(found.values()) < 0.02
    for spoiled in found:
        weight = layers[spoiled].weight
        wrong = replace(layers[spoiled], weight=replace(weight, values=weight.values[::-1].copy()))
        layer, error = first_divergence(errors(even, tmp_path, layers | {spoiled: wrong}, backend))
        assert layer == spoiled and error > 0.5


def test_without_a_layer_beyond_the_limit_the_largest_error_is_named():
    assert first_divergence({"a": 0.01, "b": 0.04, "c": 0.02}) == ("b", 0.04)
    assert first_divergence({"a": 0.01, "b": 0.2, "c": 0.9}) == ("b", 0.2)
    assert first_divergence({"a": 0.01, "b": float("nan"), "c": 0.9})[0] == "b"
    assert first_divergence({}) is None


def verification(**stages: float) -> Verification:
    rows = {name: {"y": {"cosine": 1.0, "relative_l2": error}} for name, error in stages.items()}
    return Verification(1, 0.1, 0.1, 1.0, (1.0, 1.0), 0.5, 0.5, 0.5, 1.0, {"a_joint": 0.1}, (0.1,), rows)


def test_a_failed_gate_names_the_first_stage_and_layer_and_asks_for_the_layer_then_only():
    assert first_diverging_stage(verification(vision=0.01, prefix=0.2, denoise=0.9)) == "prefix"
    assert first_diverging_stage(verification(vision=0.01, prefix=0.03)) == "prefix"
    assert first_diverging_stage(verification()) is None
    asked = []

    def locate(stage):
        asked.append(stage)
        return "layers.3.up", 0.31

    check(verification(vision=0.5), Accept(), locate)
    assert not asked
    with pytest.raises(
        VerifyError, match="diverges first, or most, in stage vision, there in layer layers.3.up by 31.0 %"
    ):
        check(verification(vision=0.5), Accept(action_error_rel=0.03), locate)
    assert asked == ["vision"]
