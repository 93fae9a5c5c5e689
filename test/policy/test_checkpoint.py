"""Whatever is missing from a checkpoint or damaged in it is one sentence: what, where, what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import JOINTS

from vla_edge.policy.checkpoint import CheckpointError, fingerprint, load_checkpoint, load_policy
from vla_edge.types import VlaEdgeError

ACTION_OUT = "model.action_out_proj.weight"
POSITIONS = "model.vlm_with_expert.vlm.model.vision_model.embeddings.position_embedding.weight"
NORMALIZER = "policy_preprocessor_step_5_normalizer_processor.safetensors"


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A damage: `change` applied to a JSON file."""

    def damage(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return damage


def replace(name: str, key: str, value: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """A damage: tensor `key` of a safetensors file becomes `value` of it, or is gone."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / name)
        changed = value(tensors.pop(key))
        save_file(tensors if changed is None else tensors | {key: changed}, directory / name)

    return damage


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def tie_to_more_joints(directory: Path) -> None:
    edit("vla_edge.json", lambda c: c["joint_names"].append("d_joint"))(directory)


def entry(*keys):
    """Delete content[keys[0]][keys[1]]..."""

    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def setting(value, *keys):
    """content[keys[0]][keys[1]]... = value."""

    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
SMALL_FILES = [
    (remove("config.json"), "has no config.json"),
    (truncate("config.json"), "config.json cannot be read"),
    (lambda d: (d / "config.json").write_text("[]"), "does not hold a JSON object"),
    (edit("config.json", setting("tdmpc", "type")), "config.json is of type 'tdmpc'"),
    (edit("config.json", entry("chunk_size")), "config.json has no entry 'chunk_size'"),
    (edit("config.json", setting("32", "chunk_size")), "config.json says chunk_size = '32'"),
    (edit("config.json", setting(0, "num_steps")), "config.json says num_steps = 0"),
    (edit("config.json", setting(2, "max_state_dim")), "max_state_dim is 2 but vla_edge.json names 3 joints"),
    (edit("config.json", setting(None, "resize_imgs_with_padding")), "does not describe a SmolVLA"),
    (edit("config.json", entry("input_features", "observation.state")), "no entry 'observation.state'"),
    (edit("config.json", setting(True, "adapt_to_pi_aloha")), "sets adapt_to_pi_aloha to True"),
    (edit("config.json", setting(1, "empty_cameras")), "sets empty_cameras to 1"),
    (edit("config.json", setting("org/backbone", "vlm_model_name")), "'org/backbone' is not a directory inside"),
    (remove("vla_edge.json"), "has no vla_edge.json"),
    (edit("vla_edge.json", entry("joint_names")), "vla_edge.json has no entry 'joint_names'"),
    (edit("vla_edge.json", setting([JOINTS[0]] * 3, "joint_names")), "names a joint twice"),
    (tie_to_more_joints, "observation.state has shape [3] but vla_edge.json names 4 joints"),
    (edit("vla_edge.json", setting(0, "dt")), "dt = 0.0 s"),
    (edit("vla_edge.json", setting(4, "trained_prefix")), "trained_prefix = 4, of chunks of 4 rows"),
    (edit("vla_edge.json", entry("cameras", "wrist")), "vla_edge.json has no entry 'wrist'"),
    (edit("vla_edge.json", setting([20, 40, 48, 48], "cameras", "head", "crop")), "leaves the 60 x 80 frame"),
    (edit("vla_edge.json", setting([0, 0, 40, 48], "cameras", "head", "crop")), "does not give the feature's shape"),
    (remove("model.safetensors"), "has no model.safetensors; copy it"),
    (pickled, "convert pytorch_model.bin to safetensors"),
    (lambda d: shutil.rmtree(d / "backbone"), "'backbone' is not a directory inside"),
    (remove("backbone/tokenizer.json"), "has no tokenizer.json"),
    (truncate("backbone/tokenizer.json"), "tokenizer.json cannot be read"),
    (remove(PRE), "has no policy_preprocessor.json"),
    (edit(PRE, lambda c: c["steps"].append({"registry_name": "image_crop", "config": {}})), "a step 'image_crop'"),
    (edit(POST, lambda c: c["steps"].append({"class": "my.Step", "config": {}})), "a step 'my.Step'"),
    (edit(PRE, lambda c: c["steps"].pop(5)), "has no normalizer_processor, so observation.state cannot be scaled"),
    (edit(PRE, setting("MEAN_STD", "steps", 5, "config", "norm_map", "VISUAL")), "scales images by MEAN_STD"),
    (edit(PRE, setting("LOG", "steps", 5, "config", "norm_map", "STATE")), "'LOG' is not a valid"),
    (remove(NORMALIZER), f"has no {NORMALIZER}"),
    (truncate(NORMALIZER), f"{NORMALIZER} cannot be read"),
    (replace(NORMALIZER, "observation.state.std", lambda t: None), "MEAN_STD lacks std"),
    (replace(NORMALIZER, "observation.state.mean", lambda t: t[:2].clone()), "observation.state"),
]
WEIGHTS = [
    (truncate("model.safetensors"), "model.safetensors cannot be read"),
    (replace("model.safetensors", ACTION_OUT, lambda t: None), f"lacks '{ACTION_OUT}'"),
    (replace("model.safetensors", ACTION_OUT, lambda t: t[:, 1:].clone()), "size mismatch for denoise.action_out"),
    (replace("model.safetensors", ACTION_OUT, lambda t: t * float("nan")), "not finite, first in denoise.action_out"),
    (replace("model.safetensors", POSITIONS, lambda t: t[1:].clone()), "24 positions is not square"),
    (edit("backbone/config.json", entry("text_config", "hidden_size")), "config.json has no entry 'hidden_size'"),
    (edit("backbone/config.json", setting(32, "text_config", "hidden_size")), "size mismatch"),
    (edit("backbone/config.json", setting(3, "text_config", "vocab_size")), "has 16 tokens and"),
    (edit("backbone/config.json", setting(5, "vision_config", "patch_size")), "a multiple of 10 px"),
    (edit("config.json", setting([24, 16], "resize_imgs_with_padding")), "resizes images to 16 x 24 px"),
    (edit("config.json", setting(3, "num_expert_layers")), "3 expert layers beside 2 text layers"),
    (edit("config.json", setting("two", "num_vlm_layers")), "do not give the shapes of a SmolVLA"),
]


def assert_one_sentence(error: CheckpointError, directory: Path, expected: str) -> None:
    message = str(error)
    assert expected in message
    assert str(directory) in message, "does not say where"
    assert "; " in message, "does not say what to do"
    assert "\n" not in message
    assert isinstance(error, VlaEdgeError)


@pytest.mark.parametrize("damage, expected", SMALL_FILES, ids=[expected for _, expected in SMALL_FILES])
def test_what_is_wrong_in_the_small_files_is_told_before_the_weights_are_read(directory, damage, expected):
    load_checkpoint(directory)
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory)
    assert_one_sentence(caught.value, directory, expected)


@pytest.mark.parametrize("damage, expected", WEIGHTS, ids=[expected for _, expected in WEIGHTS])
def test_weights_that_are_damaged_or_do_not_fit_are_told(directory, damage, expected):
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        load_policy(load_checkpoint(directory))
    assert_one_sentence(caught.value, directory, expected)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint directory .*nowhere; give one"):
        load_checkpoint(tmp_path / "nowhere")


def test_each_side_is_scaled_by_its_own_processor(directory):
    other = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    replace(other, "action.min", lambda t: t - 1)(directory)
    replace(NORMALIZER, "action.min", lambda t: t + 7)(directory)
    spec = load_checkpoint(directory).spec
    assert spec.action.statistics["min"] == (-2.0, -1.5, -1.0)
    assert spec.state.statistics["mean"] == (0.5, -0.25, 0.0)
    assert (spec.state.eps, spec.action.eps) == (1e-8, 1e-6)


def test_without_the_new_line_step_the_prompt_has_none(directory):
    assert load_checkpoint(directory).spec.prompt == "{instruction}\n"
    edit(PRE, lambda c: c["steps"].pop(2))(directory)
    assert load_checkpoint(directory).spec.prompt == "{instruction}"


def test_what_transformers_leaves_out_of_a_backbone_is_its_default(directory):
    from vla_edge.policy.smolvla_shapes import smolvla_config

    for key in ("intermediate_size", "num_hidden_layers", "layer_norm_eps"):
        edit("backbone/config.json", entry("vision_config", key))(directory)
    edit("backbone/config.json", entry("text_config", "rms_norm_eps"))(directory)
    edit("backbone/config.json", entry("text_config", "head_dim"))(directory)
    shapes = smolvla_config(load_checkpoint(directory))
    assert (shapes.vision_hidden, shapes.vision_layers, shapes.vision_eps) == (3072, 12, 1e-6)
    assert (shapes.text_eps, shapes.head_dim) == (1e-6, 4)


def test_the_fingerprint_tells_any_change_of_content_or_name(directory):
    original = fingerprint(directory)
    assert original == fingerprint(directory)
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = fingerprint(directory)
    (directory / "vla_edge.json").rename(directory / "vla_edge.jsonl")
    assert len({original, changed, fingerprint(directory)}) == 3


def test_a_backbone_is_taken_from_the_hubs_cache_and_counts_for_the_fingerprint(directory, monkeypatch):
    expected = load_policy(load_checkpoint(directory)).state_dict()
    edit("config.json", setting("org/backbone", "vlm_model_name"))(directory)
    cache = directory.parent / "home" / "hub" / "models--org--backbone" / "snapshots" / "0"
    cache.parent.mkdir(parents=True)
    (directory / "backbone").rename(cache)
    monkeypatch.setenv("HF_HOME", str(directory.parent / "home"))
    checkpoint = load_checkpoint(directory)
    assert checkpoint.tokenizer_path == cache / "tokenizer.json"
    for name, tensor in load_policy(checkpoint).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    edit(str(cache / "config.json"), lambda c: c.update(added=1))(directory)
    assert load_checkpoint(directory).fingerprint != checkpoint.fingerprint
