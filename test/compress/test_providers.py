"""Other libraries' results in our representation compute what the libraries' own simulation computes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tiny_subject import Subject, make_observations

from vla_edge.compress.calibrate import collect
from vla_edge.compress.fake import installed
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.trace import policy_layers


def recipe(**step):
    return parse_recipe({"name": "test", "steps": [{"quantize": {"targets": ["*"], **step}}]})


def carried_out(loaded, found):
    data = collect(make_observations(12), "random observations", frames=8, held_out=2)
    return carry_out(found, *loaded, data, lambda *_: None)


STEPS = [
    {"weights": "int4", "group_size": 16, "method": "awq"},
    {"weights": "int8", "activations": "int8"},
    {"weights": "fp8", "activations": "fp8"},
]


@pytest.mark.parametrize("step", STEPS, ids=["int4-awq", "int8-smoothquant", "fp8"])
def test_modelopt_read_back_gives_modelopts_chunks(loaded, step, monkeypatch):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    from vla_edge.compress.providers import modelopt

    kept = {}
    quantize = modelopt.quantize

    def and_keep(root, modules, step, run):
        layers = quantize(root, modules, step, run)
        kept["policy"] = root  # simulates its own quantization from now on
        return layers

    monkeypatch.setattr(modelopt, "quantize", and_keep)
    done = carried_out(loaded, recipe(provider="modelopt", **step))
    theirs = Subject(kept["policy"], loaded[1]).chunks()
    subject = Subject(done.policy, loaded[1])
    with installed(policy_layers(done.policy.stages()), done.layers):
        ours = subject.chunks()
    plain = Subject(copy.deepcopy(loaded[0]), loaded[1]).chunks()
    assert np.abs(ours - theirs).mean() < 0.1 * np.abs(theirs - plain).mean()
    assert all(layer.precision == step["weights"] for layer in done.layers.values())


def test_what_a_provider_cannot_do_or_is_not_there_is_said_before_any_work(loaded, monkeypatch):
    with pytest.raises(RecipeError, match="provider is 'modelop'"):
        recipe(provider="modelop", weights="int8")
    from vla_edge.compress.providers import modelopt

    def absent():
        raise ImportError("no module named modelopt")

    monkeypatch.setattr(modelopt, "load", absent)
    with pytest.raises(RecipeError, match="needs the package nvidia-modelopt.*pip install nvidia-modelopt"):
        carried_out(loaded, recipe(provider="modelopt", weights="int8", activations="int8"))
    monkeypatch.setattr(modelopt, "load", lambda: None)
    with pytest.raises(RecipeError, match="does not offer weights int8, activations null, method gptq; it offers"):
        carried_out(loaded, recipe(provider="modelopt", weights="int8", method="gptq"))
