"""What is handed over to other runtimes is the policy that passed verification here, whole, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_edge.cli import main
from vla_edge.compress.calibrate import collect
from vla_edge.compress.recipe import Accept, parse_recipe
from vla_edge.engine import build as building
from vla_edge.engine import piecewise
from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.handover import hand_over
from vla_edge.engine.llama_directory import llama_name
from vla_edge.engine.packed_layers import LayoutError
from vla_edge.engine.piecewise import whole_memory
from vla_edge.engine.verify import VerifyError
from vla_edge.policy.bins import BINS
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.weights import Weights, find_weights
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity" / "openvla"
ROUNDED = {"targets": ["prefill.layers"], "weights": "int4", "group_size": 8}


def recipe(*steps: dict, **accept):
    return parse_recipe({"name": "some", "steps": list(steps) or [{"quantize": ROUNDED}], **accept})


@pytest.fixture
def openvla(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED / "openvla" / "checkpoint", tmp_path / "robot" / "checkpoint"))


def data_of(directory: Path):
    spec, rng = load_checkpoint(directory).spec, np.random.default_rng(3)

    def observation(index: int) -> Observation:
        images = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), dtype=np.uint8) for c in spec.cameras}
        joints = JointState(0, spec.read_names, rng.normal(0, 0.3, len(spec.read_names)))
        return Observation(200_000_000 * index, images, joints, "touch the red cube")

    return collect(map(observation, range(6)), "random observations", frames=3, held_out=2)


@pytest.mark.slow
def test_all_of_a_policy_is_there(openvla, tmp_path, monkeypatch, capsys):
    (openvla / "some.yaml").write_text(json.dumps(recipe().to_dict()))
    monkeypatch.setattr(building, "calibration_source", lambda given, directory: data_of(openvla))
    directory = tmp_path / "out"
    asked = [str(openvla), str(directory), "--layout", "modelopt", "--recipe", str(openvla / "some.yaml")]
    assert main(["export", *asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in directory.iterdir()) == ["action_tokens", "language", "policy.json", "vision.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "robot"}  # and nothing beside it
    facts = json.loads((directory / "policy.json").read_text())
    assert told["layers"] == facts["layers"] and told["verification"]["by"] == "onnxruntime, on the same layers"
    # what sees
    policy = load_policy(load_checkpoint(openvla))
    stage = policy.stages()[0]
    interface = StageInterface(stage.name, stage.inputs, stage.outputs)
    picture = np.random.default_rng(0).uniform(-1, 1, stage.inputs[0].shape).astype(np.float32)
    runtime = get_backend("onnxruntime")
    seen = runtime.load(directory / "vision.onnx", interface, {}).run({"image": picture})["image_tokens"]
    np.testing.assert_allclose(seen, stage.module(torch.from_numpy(picture))[0].detach(), atol=1e-4)
    assert [tuple(t["shape"]) for t in facts["vision"]["outputs"]] == [stage.outputs[0].shape]
    # what reads and writes
    weights = Weights(find_weights(directory / "language"))
    original = Weights(load_checkpoint(openvla).weights)
    for ours in ("layers.0.q", "layers.2.mlp.down"):
        full = original[f"language_model.{llama_name(ours)}.weight"].float()
        found = weights[f"{llama_name(ours)}.weight"]
        step = full.reshape(*full.shape[:1], -1, 8).abs().amax(-1).repeat_interleave(8, 1) / 7
        assert ((found - full).abs() <= 0.51 * step).all() and facts["layers"][f"prefill.{ours}"]["weights"] == "int4"
    first = facts["action_tokens"]["first"]
    head = original["language_model.lm_head.weight"]
    np.testing.assert_array_equal(weights["lm_head.weight"][first : first + BINS], head[first : first + BINS].half())
    assert first + BINS + 64 == len(head) and facts["action_tokens"]["written"] == len(facts["joint_names"])
    assert main(["export", *asked]) == 2 and "exists already" in capsys.readouterr().err  # nothing is replaced


@pytest.mark.slow
def test_in_pieces_it_is_the_same_to_the_byte(openvla, tmp_path, monkeypatch):
    monkeypatch.setattr(piecewise, "_PROGRAM", 0)  # beside this policy PyTorch itself is large
    chosen, data = recipe(), data_of(openvla)
    too_little = whole_memory(load_checkpoint(openvla), chosen) - 1
    whole, pieces = (
        hand_over(openvla, tmp_path / name, "compressed_tensors", chosen, data, build_memory_mb=memory).directory
        for name, memory in (("whole", 1e6), ("pieces", too_little / 1e6))
    )
    for file in sorted((whole / "language").iterdir()):
        assert file.read_bytes() == (pieces / "language" / file.name).read_bytes(), file.name


@pytest.mark.slow
def test_one_that_strays_too_far_is_not_handed_over(openvla, tmp_path):
    from dataclasses import replace

    strict = replace(recipe(), accept=Accept(relative_l2=-1.0))
    with pytest.raises(VerifyError):
        hand_over(openvla, tmp_path / "out", "modelopt", strict, data_of(openvla))
    assert {path.name for path in tmp_path.iterdir()} == {"robot"}


@pytest.mark.parametrize(("family", "layout", "steps", "told"), [
    ("openvla", "edge_llm", [], "groups of 8, and Edge-LLM multiplies groups of 128"),
    ("openvla", "gguf", [], "no layout 'gguf'"),
    ("openvla", "modelopt", [{"quantize": {**ROUNDED, "weights": "int8", "group_size": None}}], "has int8 weights"),
    ("openvla", "modelopt", [{"quantize": {**ROUNDED, "weights": "int8", "activations": "int8"}}], "rounds its inputs"),
    ("openvla", "modelopt", [{"lowrank": {"targets": ["prefill.layers"], "rank": 4}}], "has a low-rank branch"),
    ("openvla", "modelopt", [{"fixed_point": {}}], r"says how tokens are read or written here \(fixed_point\)"),
    ("openvla", "modelopt", [{"kv_cache": {}}], r"says how tokens are read or written here \(kv_cache\)"),
    ("oft", "modelopt", [], "writes no tokens one after the other"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_compressed(tmp_path, family, layout, steps, told):
    with pytest.raises(LayoutError, match=told):
        hand_over(SAVED / family / "checkpoint", tmp_path / "out", layout, recipe(*steps), calibration=tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_policy_without_tokens_is_named(checkpoint, tmp_path):
    with pytest.raises(LayoutError, match="is a smolvla that writes no tokens"):
        hand_over(checkpoint, tmp_path / "out", "modelopt", recipe(), calibration=tmp_path / "none")


def test_the_command_says_it_in_one_sentence(tmp_path, capsys):
    code = main(["export", str(SAVED / "openvla" / "checkpoint"), str(tmp_path / "out"), "--layout", "gguf"])
    said = capsys.readouterr().err
    assert code == 2 and said == "vla-edge: there is no layout 'gguf'; choose one of edge_llm, modelopt, compressed_tensors, awq\n"


def test_its_name_as_a_backend_leads_to_the_command():
    with pytest.raises(BackendError, match="no backend 'edge_llm' .vla-edge export writes edge_llm's files"):
        get_backend("edge_llm")
