"""Core ML's packages are written anywhere, and what can be told of them without running them is; they run on macOS."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from toy import compressed, interface, toy_inputs, words_stage

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.export import export_stage
from vla_edge.policy.stages import TensorSpec

pytestmark = pytest.mark.peers
ct = pytest.importorskip("coremltools", reason="coremltools is not installed")
runtime = get_backend("coreml")


@pytest.fixture
def built(toy, tmp_path):
    """(stage, its archive, its package unpacked)."""
    stage, graph = toy
    source = export_stage(stage, compressed(stage, "int8 static"), tmp_path / "toy.onnx", graph)
    file = tmp_path / runtime.build(source, tmp_path, interface(stage)).file
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    return interface(stage), file, tmp_path / "toy.mlpackage"


def test_a_package_holds_the_stage_and_its_weights(built):
    stage, file, package = built
    spec = ct.utils.load_spec(str(package))
    function = spec.mlProgram.functions["main"]
    kinds = [operation.type for operation in function.block_specializations[function.opset].operations]
    assert {"softmax", "layer_norm", "round"} <= set(kinds)
    assert kinds.count("linear") + kinds.count("matmul") == 7  # five layers, queries with keys, weights with values
    weights = (package / "Data/com.apple.CoreML/weights/weight.bin").read_bytes()
    assert len(weights) > 4 * 40 * 24 * 3  # of queries, keys and values, in float32


def test_a_table_in_bfloat16_is_held_in_what_core_ml_knows(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_edge.engine.lower.LEAST_TABLE", 1000)
    stage = words_stage()
    source = export_stage(stage, {}, tmp_path / "words.onnx")
    assert (tmp_path / runtime.build(source, tmp_path, interface(stage)).file).stat().st_size > 4 * 1000 * 32 * 0.8


def test_what_cannot_be_the_stage_is_a_backend_error(built):
    stage, file, package = built
    other = StageInterface("toy", (TensorSpec("x", (1, 2, 40)), *stage.inputs[1:]), stage.outputs)
    with pytest.raises(BackendError, match="other inputs than the stage"):
        runtime.check_package(package, other)
    weights = package / "Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:64])
    with pytest.raises(BackendError, match="lies outside its file"):
        runtime.check_package(package, stage)


def test_it_is_not_run_where_it_cannot_be(built, monkeypatch):
    stage, file, _ = built
    monkeypatch.setattr(runtime.platform, "system", lambda: "Linux")
    assert not runtime.runs_here()
    with pytest.raises(BackendError, match="runs on macOS, and this is Linux"):
        runtime.load(file, stage)


def test_tensors_are_passed_by_their_places(built, monkeypatch):
    """Held to an imitation of Core ML's model, since there is none outside macOS."""
    stage, file, _ = built

    class Imitation:
        def __init__(self, path):
            self._spec = ct.utils.load_spec(path)

        def get_spec(self):
            return self._spec

        def predict(self, tensors):
            return {"output_1": tensors["input_1"][:, None] + np.zeros((1, 9, 1), np.float32),
                    "output_0": tensors["input_0"][..., :7]}  # fmt: skip

    monkeypatch.setattr(runtime.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(ct.models, "MLModel", Imitation)
    inputs = toy_inputs()
    got = runtime.load(file, stage).run(inputs)
    np.testing.assert_array_equal(got["y"], inputs["x"][..., :7])
    np.testing.assert_array_equal(got["h"], np.repeat(inputs["shift"][:, None], 9, 1))


@pytest.mark.timeout(900)  # four conversions
def test_an_engine_for_macos_is_verified_by_another_runtime(checkpoint, data, tmp_path):
    from vla_edge.engine.build import build
    from vla_edge.engine.bundle import Bundle

    bundle = Bundle.load(build(checkpoint, "fp32", "coreml", tmp_path / "engine", data))
    assert {entry.backend for entry in bundle.stages} == {"coreml"}
    assert bundle.manifest["verification"]["by"] == "onnxruntime" and bundle.manifest["profile"] == {}


def test_a_file_that_is_none_is_a_backend_error(toy, tmp_path):
    (tmp_path / "toy.onnx").write_bytes(b"\x08\x0a" + bytes(50))
    with pytest.raises(BackendError, match="cannot read stage file"):
        runtime.build(tmp_path / "toy.onnx", tmp_path, interface(toy[0]))
    assert not list(tmp_path.glob("*.zip"))
