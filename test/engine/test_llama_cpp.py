"""llama.cpp writes the tokens that the policy writes, from its own file with our quantized weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_edge.compress.calibrate import collect
from vla_edge.compress.recipe import parse_recipe
from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.backends.torch import TorchStage
from vla_edge.engine.build import build
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.export import linear_layers
from vla_edge.engine.gguf_file import export_language
from vla_edge.engine.product import in_precision
from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint
from vla_edge.policy.openvla import OpenVLA, OpenVLAConfig, TowerConfig
from vla_edge.policy.stages import Stage
from vla_edge.types import JointState, Observation

pytestmark = pytest.mark.peers
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
runtime = get_backend("llama_cpp")

CHECKPOINT = Path(__file__).parents[1] / "parity" / "openvla" / "openvla" / "checkpoint"
# of the norm of the scores; llama.cpp rounds inputs of quantized weights to 8 bits, other weights would err by 1.4
LIMITS = {"float32": 1e-5, "float16": 2e-3, "int8 weights": 0.03, "int4 weights": 0.03}


@pytest.fixture(scope="module")
def stage() -> Stage:
    """Of a random OpenVLA with heads that share keys."""
    torch.manual_seed(0)
    tower = TowerConfig(14, 32, 64, 1, 2, 0, (0.5,) * 3, (0.5,) * 3)
    policy = OpenVLA(
        OpenVLAConfig(
            cameras=1, image_size=42, towers=(tower,), projector=(48,), vocabulary=50, width=64, hidden=96, layers=2, heads=4,
            kv_heads=2, eps=1e-5, wavelength=10_000.0, language_length=12, action_dim=7, chunk_size=2,
        )
    ).eval()  # fmt: skip
    policy.generates = True
    return policy.stages()[1]


def interface(stage: Stage) -> StageInterface:
    return StageInterface(stage.name, stage.inputs, stage.outputs)


def inputs(stage: Stage, words: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image, prompt, mask = stage.inputs
    return {
        "image_tokens": rng.normal(size=image.shape).astype(np.float32), "lang_tokens": rng.integers(3, 50, prompt.shape),
        "lang_mask": np.arange(mask.shape[1])[None] < words,
    }  # fmt: skip


def rounded(stage: Stage, precision: str):
    """Layers of the reading stage in `precision`, and the stage in float32 with the weights that they stand for."""
    other = copy.deepcopy(stage)
    found = {
        name.removeprefix("prefill."): in_precision(layer.weight.detach().numpy(), precision, 32)
        for name, layer in linear_layers(stage).items() if name.startswith("prefill.")
    }  # fmt: skip
    for name, layer in found.items():
        module = other.module.prefill.get_submodule(name)
        module.weight = torch.nn.Parameter(torch.from_numpy(layer.dense_weight()))
    return found, other


@pytest.mark.parametrize("precision", LIMITS)
def test_all_scores_are_the_policys_with_the_same_weights(stage, tmp_path, precision):
    layers, reference = rounded(stage, precision)
    file = export_language(stage, layers, tmp_path / "generate.gguf")
    loaded = runtime.load(file, interface(stage), {"cache": "float32"})
    for words in (4, 12, 7):  # shorter after longer: nothing of the last prompt is left
        given = inputs(stage, words, seed=words)
        expected = TorchStage(reference).run(given)["token_scores"]
        found = loaded.run(given)["token_scores"]
        # tokens are the likeliest, so after one that differs everything does: up to there
        differ = np.flatnonzero(found[0].argmax(-1) != expected[0].argmax(-1))
        until = differ[0] + 1 if len(differ) else len(found[0])
        distance = np.linalg.norm((found - expected)[0, :until]) / np.linalg.norm(expected[0, :until])
        assert distance < LIMITS[precision] and (until == len(found[0]) or "int" in precision)


def test_keys_and_values_in_float16_change_little(stage, tmp_path):
    file = export_language(stage, {}, tmp_path / "generate.gguf")
    given = inputs(stage, 6)
    full, half = (
        runtime.load(file, interface(stage), {"cache": cache}).run(given)["token_scores"] for cache in ("float32", "float16")
    )
    distance = np.linalg.norm(half[0, 0] - full[0, 0]) / np.linalg.norm(full[0, 0])
    assert 0 < distance < 0.01


@pytest.mark.parametrize("steps", [
    [], [{"quantize": {"targets": ["vision"], "weights": "int8"}}, {"keep": {"targets": ["prefill"], "dtype": "float16"}}],
], ids=["float32", "float16"])  # fmt: skip
def test_a_bundle_sees_with_one_runtime_and_writes_with_the_other(tmp_path, steps):
    spec, rng = load_checkpoint(CHECKPOINT).spec, np.random.default_rng(3)

    def observation(index: int) -> Observation:
        images = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), dtype=np.uint8) for c in spec.cameras}
        joints = JointState(0, spec.read_names, rng.normal(0, 0.3, len(spec.read_names)))
        return Observation(200_000_000 * index, images, joints, "touch the red cube")

    data = collect(map(observation, range(6)), "random observations", frames=3, held_out=2)
    recipe = parse_recipe({"name": "both", "steps": steps})
    path = build(CHECKPOINT, recipe, "onnxruntime,llama_cpp", tmp_path / "b", data)
    assert [(s.interface.name, s.backend) for s in Bundle.load(path).stages] == [
        ("vision", "onnxruntime"), ("generate", "llama_cpp")
    ]  # fmt: skip
    engine, policy = Runner.from_bundle(path), Runner.from_checkpoint(CHECKPOINT)
    pairs = [(runner.infer(o).chunk.positions for runner in (engine, policy)) for o in data.held_out]
    alike = [np.abs(a - b).max() < 2e-3 for a, b in pairs]
    assert all(alike) if not steps else any(alike)


@pytest.mark.parametrize(("steps", "backend", "said"), [
    ([{"fixed_point": {}}], "onnxruntime,llama_cpp", "take kv_cache, fixed_point, speculate"),
    ([{"kv_cache": {}}], "onnxruntime,llama_cpp", "take kv_cache, fixed_point, speculate"),
    ([], "llama_cpp", "none of llama_cpp reads the file of stage 'vision', which is ONNX"),
    ([{"quantize": {"targets": ["*"], "weights": "int8", "activations": "int8"}}], "onnxruntime,llama_cpp", "rounds its inputs"),
])  # fmt: skip
def test_what_it_cannot_do_is_an_error_and_leaves_nothing(tmp_path, steps, backend, said):
    spec, rng = load_checkpoint(CHECKPOINT).spec, np.random.default_rng(3)
    images = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), dtype=np.uint8) for c in spec.cameras}
    joints = JointState(0, spec.read_names, np.zeros(len(spec.read_names)))
    seen = [Observation(200_000_000 * i, images, joints, "touch the red cube") for i in range(4)]
    data = collect(seen, "one observation", frames=2, held_out=1)
    from vla_edge.types import VlaEdgeError

    with pytest.raises(VlaEdgeError, match=said):
        build(CHECKPOINT, parse_recipe({"name": "no", "steps": steps}), backend, tmp_path / "b", data)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_and_another_policys_are_backend_errors(stage, tmp_path):
    file = export_language(stage, {}, tmp_path / "generate.gguf")
    image, *rest = stage.inputs
    wider = StageInterface("generate", (replace(image, shape=(1, 9, 128)), *rest), stage.outputs)
    with pytest.raises(BackendError, match="is 64 wide with 256 tokens"):
        runtime.load(file, wider)
    (tmp_path / "generate.gguf").write_bytes(file.read_bytes()[:500])
    with pytest.raises(BackendError, match="cannot load stage file"):
        runtime.load(file, interface(stage))
    (tmp_path / "generate.words.npy").unlink()
    with pytest.raises(BackendError, match="generate.words.npy, the words of stage file"):
        runtime.load(file, interface(stage))


def test_the_table_of_runtimes_says_that_it_ran(monkeypatch):
    from vla_edge.engine import language_probe, overview

    monkeypatch.setattr(overview, "BACKENDS", {"llama_cpp": ("", "")})
    (row,) = overview.overview()
    assert row.ran == language_probe.PRECISIONS and not row.refused
