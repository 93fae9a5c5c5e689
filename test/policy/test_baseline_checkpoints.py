"""What is wrong with the directory of an ACT or a diffusion policy is one sentence with its likely cause."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from vla_edge.engine.runner import Runner, RunnerError
from vla_edge.policy.checkpoint import CheckpointError, load_checkpoint, load_policy
from vla_edge.policy.schedule import denoising_steps, signal_levels
from vla_edge.policy.spec import DiffusionSpec, PolicySpec
from vla_edge.types import JointState, Observation, VlaEdgeError

SAVED = Path(__file__).parents[1] / "parity" / "baselines"
NORMALIZER = "policy_preprocessor_step_3_normalizer_processor.safetensors"


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAVED / name / "checkpoint", tmp_path / name))


@pytest.fixture(params=["act", "diffusion"])
def directory(request, tmp_path) -> Path:
    return copied(request.param, tmp_path)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def retensor(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_policy(load_checkpoint(directory))
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


def observation(spec: PolicySpec, stamp_ns: int = 0, instruction: str = "") -> Observation:
    rng = np.random.default_rng(stamp_ns)
    frames = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), np.uint8) for c in spec.cameras}
    joints = JointState(stamp_ns, spec.joint_names, rng.normal(0, 0.3, len(spec.joint_names)))
    return Observation(stamp_ns, frames, joints, instruction)


def test_missing_and_unknown_tensors_are_listed_with_the_likely_cause(directory):
    def rename(tensors: dict) -> None:
        name = next(name for name in tensors if name.endswith("layer1.0.conv1.weight") or name.endswith("4.0.conv1.weight"))
        tensors["vlm_with_expert.surprise"] = tensors.pop(name)

    retensor(directory / "model.safetensors", rename)
    told = refused(directory)
    assert "conv1.weight'" in told and "holds 'vlm_with_expert.surprise', which nothing reads; it is a SmolVLA" in told


def test_statistics_of_pictures_joints_and_actions_are_asked_for(directory):
    retensor(directory / NORMALIZER, lambda t: [t.pop(name) for name in list(t) if name.startswith("observation.images.wrist")])
    assert "does not say how to scale observation.images.wrist: normalization MEAN_STD lacks mean, std" in refused(directory)


def test_statistics_inside_the_model_name_the_way_to_convert_it(directory):
    name = "normalize_inputs.buffer_action.mean"
    retensor(directory / "model.safetensors", lambda t: t.update({name: next(iter(t.values())).clone()}))
    (directory / "policy_preprocessor.json").unlink()
    assert "lerobot.processor.migrate_policy_normalization" in refused(directory)


@pytest.mark.parametrize(
    "name, entries, told",
    [
        ("act", {"vision_backbone": "resnet50"}, "names the vision backbone 'resnet50'; this version loads resnet18, resnet34"),
        ("act", {"replace_final_stride_with_dilation": True}, "sets replace_final_stride_with_dilation to True"),
        ("act", {"feedforward_activation": "glu"}, "feedforward_activation = 'glu'; this version does relu, gelu"),
        ("act", {"n_heads": 3}, "n_heads = 3 of a width of 32"),
        ("act", {"chunk_size": 9}, "does not fit config.json"),
        ("diffusion", {"noise_scheduler_type": "EDM"}, "noise_scheduler_type = 'EDM'; this version does DDPM, DDIM"),
        ("diffusion", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; known are linear"),
        ("diffusion", {"use_separate_rgb_encoder_per_camera": True}, "use_separate_rgb_encoder_per_camera to True"),
        ("diffusion", {"n_action_steps": 8}, "a horizon of 8 rows does not hold 8 actions after 2 observations"),
        ("diffusion", {"num_inference_steps": 13}, "num_inference_steps is 13 of 12 noise levels"),
        ("diffusion", {"crop_shape": [90, 90]}, "90 x 90 px cannot be cropped"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(tmp_path, name, entries, told):
    directory = copied(name, tmp_path)
    edit(directory / "config.json", lambda content: content.update(entries))
    assert told in refused(directory)


def test_an_input_no_robot_can_give_is_named(directory):
    extra = {"observation.environment_state": {"type": "ENV", "shape": [3]}}
    edit(directory / "config.json", lambda content: content["input_features"].update(extra))
    assert "has the input observation.environment_state, which no robot can give" in refused(directory)


def test_spec_survives_the_manifest(directory):
    spec = load_checkpoint(directory).spec
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.cameras[0].is_scaled and not spec.reads_instruction


def test_a_policy_without_language_acts_whatever_it_is_told_and_an_empty_word_still_withdraws(directory):
    checkpoint = load_checkpoint(directory)
    runner = Runner.from_checkpoint(directory)
    runner.warm_up()
    said = [runner.infer(observation(checkpoint.spec, 7, text)).chunk.positions for text in ("", "touch the cube")]
    np.testing.assert_array_equal(*said)
    runner.check_instruction("anything")
    with pytest.raises(VlaEdgeError, match="instruction is empty"):
        runner.check_instruction(" ")


def test_several_observations_are_read_oldest_first_and_the_first_stands_for_what_came_before(tmp_path):
    runner = Runner.from_checkpoint(copied("diffusion", tmp_path))
    old, new = (observation(runner.spec, stamp) for stamp in (1, 2))
    alone = runner.infer(new).chunk.positions
    np.testing.assert_array_equal(alone, runner.infer(replace(new, before=(new,))).chunk.positions)
    together = runner.infer(replace(new, before=(old,))).chunk.positions
    assert np.abs(together - alone).max() > 1e-3
    np.testing.assert_array_equal(together, runner.infer(replace(new, before=(new, old))).chunk.positions)


def test_noise_follows_from_seed_and_stamp_and_fewer_steps_can_be_taken(tmp_path):
    runner = Runner.from_checkpoint(copied("diffusion", tmp_path))
    seen = observation(runner.spec)
    assert runner.num_steps == 12 and runner.noise_shape == (12, 8, 5)
    first = runner.infer(seen, seed=3).chunk.positions
    np.testing.assert_array_equal(first, runner.infer(seen, seed=3).chunk.positions)
    assert np.abs(first - runner.infer(seen, seed=4).chunk.positions).max() > 1e-3
    runner.set_num_steps(4)
    assert runner.noise_shape == (4, 8, 5) and np.isfinite(runner.infer(seen).chunk.positions).all()
    with pytest.raises(RunnerError, match="knows 12 noise levels: allowed is 1 to 12"):
        runner.set_num_steps(13)


@pytest.mark.parametrize("sampler", ["DDPM", "DDIM"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_a_network_that_knows_the_actions_leads_any_noise_to_them(sampler, prediction):
    spec = DiffusionSpec(sampler, 50, "squaredcos_cap_v2", 1e-4, 0.02, prediction, 1.0, 8, 1)
    rng = np.random.default_rng(0)
    wanted, x = rng.uniform(-0.9, 0.9, (8, 3)), rng.normal(size=(8, 3))
    levels = signal_levels(spec)
    assert (np.diff(levels) < 0).all() and levels[-1] < 1e-3
    for step in denoising_steps(spec, 10):
        epsilon = (x - step.signal * wanted) / step.noise
        x = step(x, epsilon if prediction == "epsilon" else wanted, rng.normal(size=x.shape))
    np.testing.assert_allclose(x, wanted, atol=1e-4)
