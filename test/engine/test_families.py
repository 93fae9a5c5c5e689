"""Every family goes the whole way: checkpoint, recipe, ONNX, bundle, chunk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vla_edge.compress.calibrate import collect
from vla_edge.compress.recipe import Accept, RecipeError, load_recipe, parse_recipe
from vla_edge.engine import build as building
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity"
CHECKPOINTS = {
    "pi0": "pi/pi0", "pi05": "pi/pi05", "openvla": "openvla/openvla", "oft": "openvla/oft",
    "act": "baselines/act", "diffusion": "baselines/diffusion_ddim", "groot": "groot/lerobot", "groot17": "groot17/isaac",
}  # fmt: skip
FLOWS = ("pi0", "pi05", "groot", "groot17")

build = partial(building.build, backend="onnxruntime")  # which is fastest is not the question here

SLOW = ("pi05", "oft", "diffusion", "groot")  # each takes as long again as what it differs little from


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CHECKPOINTS],
)
def family(request, tmp_path_factory):
    """A checkpoint its original has saved, observations for it, and graphs to share between builds."""
    directory = tmp_path_factory.mktemp(request.param) / "checkpoint"
    shutil.copytree(SAVED / CHECKPOINTS[request.param] / "checkpoint", directory)
    seen = partial(observation, load_checkpoint(directory).spec, np.random.default_rng(0))
    data = collect(map(seen, range(24)), "random observations", frames=8, held_out=4)
    return directory, data, {}


def observation(spec, rng: np.random.Generator, index: int) -> Observation:
    sizes = {c.name: (c.source_height, c.source_width, 3) for c in spec.cameras}
    images = {name: rng.integers(0, 256, size, dtype=np.uint8) for name, size in sizes.items()}
    names = tuple(dict.fromkeys((*spec.joint_names, *spec.read_names)))
    joints = JointState(0, names, rng.normal(0, 0.3, len(names)))
    stamp = 200_000_000 * index + 5_000_000_000 * (index // 4)
    return Observation(stamp, images, joints, ("touch the red cube", "push the ball")[index // 4 % 2])


@pytest.mark.parametrize(("name", "generates"), [*((name, False) for name in CHECKPOINTS), ("openvla", True)])
def test_an_inference_call_by_call_is_the_inference(name, generates):
    checkpoint = load_checkpoint(SAVED / CHECKPOINTS[name] / "checkpoint")
    policy = load_policy(checkpoint)
    assert getattr(policy, "can_generate", False) is (name == "openvla")
    policy.generates = generates
    runner, seen = Runner.from_policy(policy, checkpoint), observation(checkpoint.spec, np.random.default_rng(0), 0)
    expected = runner.infer(seen, seed=3).chunk.positions
    walk, calls, chunk = runner.steps(seen, seed=3), [], None
    while chunk is None:
        try:
            stage, call = next(walk)
            calls.append(stage)
            call()
        except StopIteration as end:
            chunk = end.value
    np.testing.assert_array_equal(chunk.positions, expected)
    assert set(calls) == {stage.name for stage in policy.stages()} - {"time"}


def test_in_full_precision_the_bundle_is_the_policy(family, tmp_path):
    directory, data, traced = family
    bundle = Runner.from_bundle(build(directory, "fp32", output=tmp_path / "b", calibration=data, traced=traced))
    policy = Runner.from_checkpoint(directory)
    for observation in data.held_out:
        ours, theirs = (runner.infer(observation, seed=3).chunk.positions for runner in (bundle, policy))
        # torch and the runtime round differently, and a random policy makes the most of it
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
    assert ours.shape == (policy.spec.chunk_size, len(policy.spec.joint_names))


@pytest.mark.parametrize("name", ["int8", "int4-awq"])
def test_in_fewer_bits_every_stage_is_close_and_verified(family, tmp_path, name):
    directory, data, traced = family
    # random weights are far coarser than trained ones, and a token that differs is another action altogether, so what
    # the recipe accepts says nothing here; each stage on the policy's own inputs does (other weights would err by 1.4)
    recipe = replace(load_recipe(name), accept=Accept())
    manifest = Bundle.load(build(directory, recipe, output=tmp_path / "b", calibration=data, traced=traced)).manifest
    assert manifest["verification"]["frames"] == 4 and manifest["profile"]["total"]["n"] > 0
    errors = [row["relative_l2"] for stage in manifest["verification"]["stages"].values() for row in stage.values()]
    assert 0 < max(errors) < {"int8": 0.6, "int4-awq": 1.0}[name]
    bits = {kind for stage in manifest["stages"].values() for kind in stage["precision"]}
    language = load_checkpoint(directory).spec.diffusion is None  # of others int4-awq leaves nothing in 4 bits
    assert bits == ({"int4", "int8"} if name == "int4-awq" and language else {"int8"})


@pytest.mark.parametrize("family", ["openvla"], indirect=True)
def test_stages_that_share_their_layers_are_compressed_once_and_alike(family, tmp_path):
    directory, data, traced = family
    recipe = replace(load_recipe("int8"), accept=Accept())
    stages = Bundle.load(build(directory, recipe, output=tmp_path / "b", calibration=data, traced=traced)).manifest["stages"]
    assert stages["prefill"]["layers"] == stages["decode"]["layers"] and len(stages["decode"]["layers"]) == 3 * 7 + 1


@pytest.mark.parametrize("family", [pytest.param("groot", marks=pytest.mark.slow), "groot17"], indirect=True)
@pytest.mark.parametrize(("name", "most"), [pytest.param("kv8", 0.02, marks=pytest.mark.slow), ("kv4", 0.2)])
def test_what_the_diffusion_transformer_looks_at_crosses_in_few_bits(family, tmp_path, name, most):
    directory, data, _ = family
    recipe = replace(load_recipe(name), accept=Accept())
    manifest = Bundle.load(build(directory, recipe, output=tmp_path / "b", calibration=data)).manifest
    assert 0 < manifest["verification"]["action_error_rel"] < most
    crossing = {tensor["name"]: tensor["dtype"] for tensor in manifest["stages"]["denoise"]["inputs"]}
    assert crossing["observed_k"] == "uint8" and "observed_k_step" in crossing


@pytest.mark.slow
def test_every_policy_is_made_smaller_trained_and_rounded(family, tmp_path):
    directory, data, _ = family
    steps = [
        {"shrink": {"targets": ["*"], "channels": 0.25}},
        {"finetune": {"steps": 2, "batch": 2}},
        {"few_steps": {"steps": 2, "batch": 2, "num_steps": 2}},
        {"quantize": {"targets": ["*"], "weights": "int8"}},
    ]
    spec = load_checkpoint(directory).spec
    flow = spec.family in FLOWS
    if not flow:
        with pytest.raises(RecipeError, match="is for flow policies"):
            build(directory, parse_recipe({"steps": steps}), output=tmp_path / "b", calibration=data)
        del steps[2]
    recipe = parse_recipe({"name": "everything", "steps": steps})
    if spec.family == "diffusion":
        with pytest.raises(RecipeError, match="cannot be trained against a teacher"):
            build(directory, recipe, output=tmp_path / "b", calibration=data)
        return
    runner = Runner.from_bundle(build(directory, recipe, output=tmp_path / "b", calibration=data))
    assert runner.num_steps == (2 if flow else 1) and np.isfinite(runner.infer(data.held_out[0]).chunk.positions).all()
