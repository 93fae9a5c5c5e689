"""Convolutions and their factors, from the race between them to a bundle that holds what has won."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
from test_families import SAVED, observation

from vla_edge.cli import main
from vla_edge.compress.calibrate import collect
from vla_edge.compress.factor.kernels import Kernel, factors_of
from vla_edge.compress.factor.replace import module_of
from vla_edge.compress.recipe import parse_recipe
from vla_edge.compress.steps import Keep, Quantize
from vla_edge.engine.build import build
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.factor_race import FactorRace
from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint
from vla_edge.policy.convolution import Convolution

INT8 = Quantize(("*",), activations="int8")


@pytest.mark.parametrize(("method", "storage"), [("tucker", INT8), ("cp", Keep(("*",)))])
def test_far_fewer_multiplications_are_faster(method, storage):
    convolution = Convolution(128, 128, (3, 3), padding=1)
    kernel = Kernel(convolution.linear.weight.detach().double().numpy(), (3, 3), (1, 1), np.eye(9 * 128))
    factors = module_of(factors_of(kernel, method, 2, None), convolution, np.zeros(9 * 128))
    assert FactorRace(["onnxruntime"])(convolution, factors, (24, 32), storage) < 0.9


def test_a_bundle_holds_factors_and_says_so(tmp_path, capsys):
    directory = shutil.copytree(SAVED / "baselines" / "act" / "checkpoint", tmp_path / "checkpoint")
    seen = partial(observation, load_checkpoint(directory).spec, np.random.default_rng(0))
    data = collect(map(seen, range(8)), "random observations", frames=4, held_out=2)
    targets = ["vision.backbone.blocks.7"]
    recipe = parse_recipe({"name": "factored", "steps": [
        {"lowrank": {"targets": targets, "method": "tucker", "rank": 8, "separate": "smaller"}},
        {"quantize": {"targets": ["vision"], "weights": "int8"}},
    ]})  # fmt: skip
    bundle = Bundle.load(build(directory, recipe, "onnxruntime", tmp_path / "bundle", data))
    rows = bundle.manifest["factored"]
    assert [row["separate"] for row in rows.values()] == [True, True]
    first = "vision.backbone.blocks.7.first.convolution.linear"
    layers = next(stage.layers for stage in bundle.stages if stage.interface.name == "vision")
    assert layers[f"{first.removeprefix('vision.')}.0.linear"]["weights"] == "int8"
    assert bundle.manifest["verification"]["action_error_rad"] > 0
    assert np.isfinite(Runner.from_bundle(bundle.directory).infer(data.held_out[0]).chunk.positions).all()
    main(["inspect", str(bundle.directory), "--layers"])
    told = capsys.readouterr().out
    assert "of 2 of 2 convolutions in their place" in told and f"{first} " in told
    assert "tucker 8+8, " in told and "not timed" in told
