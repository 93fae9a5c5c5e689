"""OpenVINO computes what the file says in float32, stays near it where it rounds more, and never fails silently."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from toy import compressed, even_stage, interface, toy_inputs

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.export import export_stage, trace
from vla_edge.policy.stages import TensorSpec

pytest.importorskip("openvino", reason="openvino is not installed")
runtime = get_backend("openvino")
PRECISIONS = (
    "float32",
    "float16",
    "lowrank",
    "int8",
    "fp8",
    "nvfp4",
    "int8 static",
    "int8 dynamic",
    "int8 static scaled",
)


@pytest.fixture(scope="module")
def even():
    stage = even_stage()
    return stage, trace(stage)


def reference(path, inputs) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(str(path))
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_float32_it_agrees_with_the_reference_evaluator(toy, tmp_path, precision):
    stage, graph = toy
    path = export_stage(stage, compressed(stage, precision), tmp_path / "toy.onnx", graph)
    got = runtime.load(path, interface(stage), {"precision": "f32"}).run(toy_inputs())
    for name, expected in reference(path, toy_inputs()).items():
        np.testing.assert_allclose(got[name], expected, atol=1e-4)


@pytest.mark.parametrize(("largest", "saturates"), [(63, False), (127, True)])
def test_weights_that_would_saturate_are_known(toy, tmp_path, largest, saturates):
    """Of a bundle from another computer; what a recipe leaves at "auto" has 7 bits on this kind of processor."""
    stage, graph = toy
    layers = compressed(stage, "int8 static")
    if not saturates:
        layers = {
            name: replace(layer, weight=replace(layer.weight, values=np.clip(layer.weight.values, -largest, largest)))
            for name, layer in layers.items()
        }
    path = export_stage(stage, layers, tmp_path / "toy.onnx", graph)
    assert runtime._saturates(path) is saturates
    assert not runtime._saturates(export_stage(stage, compressed(stage, "int8"), tmp_path / "weights.onnx", graph))


@pytest.mark.parametrize("precision", ["int4", "int4 scaled", "int4 foreign"])
def test_packed_4_bit_weights_are_multiplied_as_they_are(even, tmp_path, precision):
    stage, graph = even
    path = export_stage(stage, compressed(stage, precision), tmp_path / "even.onnx", graph)
    x = {"x": np.random.default_rng(0).normal(size=(1, 8, 64)).astype(np.float32)}
    expected = reference(path, x)["y"]
    for options in runtime.candidates(path):
        got = runtime.load(path, interface(stage), options).run(x)["y"]
        atol = 1e-4 if options.get("exact", True) else 0.03 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=atol, err_msg=str(options))


def test_rounding_to_bfloat16_is_marked_and_stays_near(toy, tmp_path):
    stage, graph = toy
    path = export_stage(stage, compressed(stage, "float32"), tmp_path / "toy.onnx", graph)
    rounding = [options for options in runtime.candidates(path) if options.get("precision") == "bf16"]
    if "bfloat16" not in runtime.precisions():
        assert not rounding
        pytest.skip("this processor does not multiply in bfloat16")
    assert rounding and all(options["exact"] is False for options in rounding)
    got = runtime.load(path, interface(stage), rounding[0]).run(toy_inputs())
    for name, expected in reference(path, toy_inputs()).items():
        difference = np.abs(got[name] - expected).max() / np.abs(expected).max()
        assert 1e-6 < difference < 0.02


def test_groups_of_an_odd_size_which_it_computes_wrongly_are_refused(toy, tmp_path):
    stage, graph = toy  # its last layer has 37 inputs, so one group of 37
    path = export_stage(stage, compressed(stage, "int4"), tmp_path / "toy.onnx", graph)
    (tmp_path / "out").mkdir()
    with pytest.raises(BackendError, match="groups of 37.*choose a group_size"):
        runtime.build(path, tmp_path / "out", interface(stage))


def test_binding_reads_and_writes_in_place_and_keeps_the_memory_alive(toy, tmp_path):
    stage, graph = toy
    loaded = runtime.load(export_stage(stage, {}, tmp_path / "toy.onnx", graph), interface(stage))
    buffers = {spec.name: spec.zeros() for spec in (*stage.inputs, *stage.outputs)}
    step = loaded.bind(buffers, buffers)
    for scale in (1.0, -2.0):
        inputs = {name: value * np.float32(scale) for name, value in toy_inputs().items()}
        for name, value in inputs.items():
            buffers[name][...] = value
        step()
        for name, value in loaded.run(inputs).items():
            np.testing.assert_array_equal(buffers[name], value)
    with pytest.raises(ValueError, match="x is not contiguous"):
        loaded.bind(buffers | {"x": np.asfortranarray(np.tile(buffers["x"], (2, 1, 1)))}, buffers)
    lone = loaded.bind(
        {name: value.copy() for name, value in toy_inputs().items()}, {s.name: s.zeros() for s in stage.outputs}
    )
    [np.empty(buffers["x"].shape, np.float32).fill(np.nan) for _ in range(50)]
    lone()


def test_a_compiled_stage_is_kept_by_content_once_it_is_part_of_a_bundle(toy, tmp_path, monkeypatch):
    stage, graph = toy
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = export_stage(stage, {}, tmp_path / "toy.onnx", graph)
    runtime.load(path, interface(stage))
    assert not (tmp_path / "cache").exists()
    (tmp_path / "manifest.yaml").touch()
    first = runtime.load(path, interface(stage)).run(toy_inputs())["y"]
    kept = list((tmp_path / "cache").rglob("*.blob"))
    assert len(kept) == 1
    np.testing.assert_array_equal(runtime.load(path, interface(stage)).run(toy_inputs())["y"], first)
    # the same name, size and second; another content
    export_stage(stage, compressed(stage, "float32") | {"q": compressed(stage, "float32")["k"]}, path, graph)
    assert not np.array_equal(runtime.load(path, interface(stage)).run(toy_inputs())["y"], first)


def test_a_damaged_file_or_one_with_other_tensors_is_a_backend_error(toy, tmp_path):
    stage, graph = toy
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x0a" + bytes(50))
    with pytest.raises(BackendError, match="cannot load stage file"):
        runtime.load(tmp_path / "bad.onnx", interface(stage))
    path = export_stage(stage, {}, tmp_path / "toy.onnx", graph)
    other = StageInterface("toy", stage.inputs, (TensorSpec("velocity", (1, 9, 7)),))
    with pytest.raises(BackendError, match="other tensors than its manifest says .velocity."):
        runtime.load(path, other)
    with pytest.raises(BackendError, match="device NPU.9, and here are CPU"):
        runtime.load(path, interface(stage), {"device": "NPU.9"})
