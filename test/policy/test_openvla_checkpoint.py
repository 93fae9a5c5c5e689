"""What is wrong with an OpenVLA directory is one sentence; what its statistics say becomes the scale of its actions."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vla_edge.policy.bins import bin_values
from vla_edge.policy.checkpoint import CheckpointError, load_checkpoint, load_policy

SAVED = Path(__file__).parents[1] / "parity" / "openvla"
CONVERT = Path(__file__).parents[2] / "tools" / "convert_weights.py"


@pytest.fixture
def openvla(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED / "openvla" / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture
def oft(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED / "oft" / "checkpoint", tmp_path / "checkpoint"))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def converter():
    """tools/convert_weights.py as a module."""
    found = importlib.util.spec_from_file_location("convert_weights", CONVERT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_policy(load_checkpoint(directory))
    assert "\n" not in str(caught.value) and "; " in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


def test_of_several_data_sets_one_has_to_be_named(openvla):
    edit(openvla / "vla_edge.json", lambda c: c.pop("unnorm_key"))
    assert "has statistics of bridge_orig, tabletop, and vla_edge.json says unnorm_key = None" in refused(openvla)
    edit(openvla / "vla_edge.json", lambda c: c.update(unnorm_key="bridge"))
    assert "unnorm_key = 'bridge'" in refused(openvla)


def test_the_data_set_that_is_named_scales_the_actions(openvla):
    stats = json.loads((openvla / "config.json").read_text())["norm_stats"]
    for key in ("tabletop", "bridge_orig"):
        edit(openvla / "vla_edge.json", lambda c, key=key: c.update(unnorm_key=key))
        action, values = load_checkpoint(openvla).spec.action, np.linspace(-1, 1, 7)
        low, high = (np.array(stats[key]["action"][name]) for name in ("q01", "q99"))
        expected = 0.5 * (values + 1) * (high - low) + low
        expected[-1] = values[-1]  # masked out
        np.testing.assert_allclose(action.unnormalize(values), expected, atol=1e-12)


def test_minimum_and_maximum_scale_where_the_robots_file_says_so(openvla):
    edit(openvla / "vla_edge.json", lambda c: c.update(normalization="MIN_MAX"))
    entry = json.loads((openvla / "config.json").read_text())["norm_stats"]["tabletop"]["action"]
    low, high = (np.array(entry[name])[:-1] for name in ("min", "max"))
    values = np.linspace(-1, 1, 7)
    found = load_checkpoint(openvla).spec.action.unnormalize(values)[:-1]
    np.testing.assert_allclose(found, 0.5 * (values[:-1] + 1) * (high - low) + low, atol=1e-12)


def test_oft_is_told_how_long_its_chunks_are_and_which_joints_it_reads(oft):
    edit(oft / "vla_edge.json", lambda c: c["state_names"].pop())
    assert "the statistics of proprio are not of the 7 joints that are read" in refused(oft)
    edit(oft / "vla_edge.json", lambda c: c.pop("chunk_size"))
    edit(oft / "vla_edge.json", lambda c: c["state_names"].append("state_7"))
    assert "vla_edge.json has no entry 'chunk_size'" in refused(oft)


def test_absent_statistics_are_asked_for(openvla):
    edit(openvla / "config.json", lambda c: c.update(norm_stats=None))
    assert "has no statistics (norm_stats)" in refused(openvla)


def test_statistics_of_another_robot_are_told(openvla):
    edit(openvla / "vla_edge.json", lambda c: c["joint_names"].pop())
    assert "the statistics of action are not of 6 joints" in refused(openvla)


@pytest.mark.parametrize(
    ("option", "value"),
    [("image_resize_strategy", "letterbox"), ("use_fused_vision_backbone", False), ("n_action_bins", 100)],
)
def test_what_would_change_the_arithmetic_is_refused(openvla, option, value):
    edit(openvla / "config.json", lambda c: c.update({option: value}))
    assert f"says {option} = {value!r}; this version loads" in refused(openvla)


def test_another_vision_tower_is_refused(openvla):
    edit(openvla / "config.json", lambda c: c.update(timm_model_ids=["vit_clip", "vit_siglip"]))
    assert "names the vision tower 'vit_clip'" in refused(openvla)


def test_a_missing_tensor_of_a_shard_is_named(openvla):
    path = openvla / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    del tensors["language_model.model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path)
    assert "lacks 'language_model.model.layers.1.mlp.down_proj.weight'; it is of an older layout" in refused(openvla)


def test_ofts_pickles_are_refused_and_the_tool_converts_them(oft):
    path = oft / "action_head--1000_checkpoint.safetensors"
    pickle = path.with_suffix(".pt")
    # as a policy that was trained in parallel is saved
    torch.save({f"module.{name}": tensor for name, tensor in load_file(path).items()}, pickle)
    wanted = load_policy(load_checkpoint(oft)).state_dict()
    path.unlink()
    assert "is a pickle, which may run code when it is opened; convert it" in refused(oft)
    assert converter().convert(pickle, path) == 16
    for name, tensor in load_policy(load_checkpoint(oft)).state_dict().items():
        assert tensor.equal(wanted[name]), name


def test_a_pickle_that_would_run_code_is_not_converted(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "trapped",))

    (tmp_path / "model.bin").write_bytes(pickle.dumps({"weight": Trap()}))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        converter().convert(tmp_path / "model.bin", tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_the_highest_token_is_the_lowest_bin():
    # as the original decodes them
    ids, edges = np.arange(32000 - 256, 32000), np.linspace(-1, 1, 256)
    expected = ((edges[:-1] + edges[1:]) / 2)[np.clip(32000 - ids - 1, 0, 254)]
    np.testing.assert_array_equal(bin_values(), expected)
    assert bin_values()[-1] == bin_values().min() and bin_values()[0] == bin_values()[1]
