"""A written checkpoint is read as it was, replaced as a whole, and holds what LeRobot asks for."""

from __future__ import annotations

import json
import stat
from dataclasses import replace

import pytest
import torch
from small import JOINTS, WORDS, small_policy, small_spec

from vla_edge.policy import checkpoint_writer
from vla_edge.policy.checkpoint import fingerprint, load_checkpoint, load_policy
from vla_edge.policy.checkpoint_files import read_tensors
from vla_edge.policy.checkpoint_writer import SPECIAL_TOKENS, write_checkpoint
from vla_edge.policy.smolvla_shapes import smolvla_config
from vla_edge.policy.spec import Normalization, NormalizationMode
from vla_edge.policy.tokenize import InstructionTokenizer

QUANTILES = Normalization(NormalizationMode.QUANTILES, {"q01": (-1.0, -0.5, 0.0), "q99": (2.0, 0.5, 0.25)}, 1e-4)
IDENTITY = Normalization(NormalizationMode.IDENTITY)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"relative_actions": False, "prompt": "{instruction}"},
        {"state": QUANTILES, "action": IDENTITY},
        {"state": IDENTITY, "action": IDENTITY},
        {"trained_prefix": 3},
    ],
    ids=["defaults", "absolute", "quantiles", "identity", "prefix"],
)
def test_what_was_written_is_read_back_exactly(tmp_path, changes):
    policy, spec = small_policy(), small_spec(**changes)
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "checkpoint", policy, spec, WORDS))
    assert checkpoint.spec == spec
    assert smolvla_config(checkpoint) == replace(policy.config, trained_prefix=spec.trained_prefix)
    loaded = load_policy(checkpoint)
    assert not loaded.training
    expected, got = policy.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_the_same_policy_gives_the_same_bytes(written, tmp_path):
    again = write_checkpoint(tmp_path / "again", small_policy(), small_spec(), WORDS)
    assert fingerprint(again) == fingerprint(written)


def test_words_get_the_rows_after_the_special_tokens(written):
    tokenizer = InstructionTokenizer(load_checkpoint(written).tokenizer_path, 12)
    tokens, mask = tokenizer("Touch the RED cube")
    assert tokens[mask].tolist() == [len(SPECIAL_TOKENS) + WORDS.index(w) for w in ("touch", "the", "red", "cube")]


def test_everything_lerobot_asks_for_lies_inside_and_is_readable_by_others(written):
    for name in (
        "config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json",
        "backbone/config.json", "backbone/tokenizer.json", "backbone/tokenizer_config.json",
        "backbone/preprocessor_config.json",
    ):  # fmt: skip
        assert (written / name).stat().st_mode & stat.S_IROTH, name
    config = json.loads((written / "config.json").read_text())
    assert (written / config["vlm_model_name"]).is_dir() and not config["load_vlm_weights"]
    steps = json.loads((written / "policy_preprocessor.json").read_text())["steps"]
    tokenizer = next(step for step in steps if step["registry_name"] == "tokenizer_processor")
    assert tokenizer["config"]["tokenizer_name"] == config["vlm_model_name"]
    for step in steps:
        assert "state_file" not in step or (written / step["state_file"]).is_file()
    special = json.loads((written / "backbone" / "tokenizer_config.json").read_text())["extra_special_tokens"]
    assert set(special) >= {"fake_image_token", "global_image_token"} and set(special.values()) <= set(SPECIAL_TOKENS)


def test_the_backbone_is_as_large_as_its_table_of_positions(written):
    vision = json.loads((written / "backbone" / "config.json").read_text())["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    name = "model.vlm_with_expert.vlm.model.vision_model.embeddings.position_embedding.weight"
    assert read_tensors(written / "model.safetensors", "torch")[name].shape == (side**2, vision["hidden_size"])


def test_a_checkpoint_is_replaced_as_a_whole(directory):
    (directory / "stray.bin").touch()
    write_checkpoint(directory, small_policy(), small_spec(dt=0.1), WORDS)
    assert not (directory / "stray.bin").exists()
    assert load_checkpoint(directory).spec.dt == 0.1
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(directory, monkeypatch):
    before = fingerprint(directory)
    monkeypatch.setattr(checkpoint_writer, "_write_processors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(directory, small_policy(), small_spec(), WORDS)
    assert fingerprint(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_joints_and_cameras_are_in_the_robot_file(written):
    facts = json.loads((written / "vla_edge.json").read_text())
    assert tuple(facts["joint_names"]) == JOINTS
    assert facts["cameras"]["head"] == {"height": 60, "width": 80, "crop": [6, 16, 48, 48]}
