"""ONNX Runtime computes what the file says, within rounding, however it is told to run it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from toy import PRECISIONS, compressed, interface, toy_inputs

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.export import export_stage
from vla_edge.policy.stages import TensorSpec

runtime = get_backend("onnxruntime")


@pytest.mark.parametrize("options", [{}, {"fold_weights": True}, {"fuse_bias": False}, {"threads": 2}], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_agrees_with_the_reference_evaluator(toy, tmp_path, precision, options):
    stage, graph = toy
    path = export_stage(stage, compressed(stage, precision), tmp_path / "toy.onnx", graph)
    names = [spec.name for spec in stage.outputs]
    expected = dict(zip(names, ReferenceEvaluator(str(path)).run(names, toy_inputs())))
    (tmp_path / "out").mkdir()
    built = runtime.build(path, tmp_path / "out", interface(stage), options)
    assert options.items() <= built.options.items()
    got = runtime.load(tmp_path / "out" / built.file, interface(stage), built.options).run(toy_inputs())
    for name in names:
        # an input on the edge between two grid points may fall to either side
        limit = (
            1e-4 if " static" not in precision and " dynamic" not in precision else 3e-2 if "int8" in precision else 0.3
        )
        difference = np.abs(got[name] - expected[name])
        assert difference.max() < limit and difference.mean() < min(limit / 10, 3e-3)


@pytest.mark.parametrize("largest", [127, 63], ids=["8 bits", "reduced range"])
@pytest.mark.parametrize("kind", ["int8 static", "int8 dynamic"])
def test_sums_of_large_products_do_not_saturate(tmp_path, kind, largest):
    """8-bit products are added in 16 bits by some CPUs' instructions: 255 * 127 twice does not fit."""
    import torch
    from torch import nn

    from vla_edge.compress.quantize.ranges import RangeObserver, calibrate
    from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, QuantizedWeight
    from vla_edge.policy.stages import Stage

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return (self.layer(x),)

    stage = Stage("one", One(), (TensorSpec("x", (1, 16, 64)),), (TensorSpec("y", (1, 16, 32)),))
    observer = RangeObserver()
    observer.update(np.array([0.0, 1.0]))
    activation = calibrate(observer) if kind == "int8 static" else ActivationQuant("dynamic")
    weight = QuantizedWeight(np.full((32, 64), largest), np.full(32, 1 / largest, np.float32), "int8")
    path = export_stage(stage, {"layer": CompressedLinear(weight, None, activation)}, tmp_path / "one.onnx")
    x = torch.ones(1, 16, 64).numpy()
    got = runtime.load(path, interface(stage), {"fuse_bias": False}).run({"x": x})["y"]
    np.testing.assert_allclose(got, 64.0, rtol=1e-5)


def test_inputs_of_packed_weights_are_rounded_to_8_bits_where_that_is_asked_for(tmp_path):
    from vla_edge.engine.product import chain_file, in_precision, product_interface

    rng = np.random.default_rng(0)
    layer = in_precision(rng.normal(size=(48, 128)).astype(np.float32), "int4 weights", 32)
    (tmp_path / "product.onnx").write_bytes(chain_file([layer], 1))
    ways = runtime.candidates(tmp_path / "product.onnx")
    assert {way["exact"] for way in ways if way.get("dynamic")} == {False} and "exact" not in ways[0]
    x = rng.normal(size=(1, 1, 128)).astype(np.float32)
    expected = x @ layer.weight.dequantize().T
    errors = []
    for dynamic in (False, True):
        way = {"threads": 1, "dynamic": dynamic}
        found = runtime.load(tmp_path / "product.onnx", product_interface(1, 128, 48), way).run({"x": x})["y"]
        errors.append(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert errors[0] < 1e-5 < 1e-3 < errors[1] < 0.02
    (tmp_path / "float.onnx").write_bytes(chain_file([in_precision(layer.weight.dequantize(), "int8 weights", 32)], 1))
    assert not any(way.get("dynamic") for way in runtime.candidates(tmp_path / "float.onnx"))


def test_binding_reads_and_writes_in_place(toy, tmp_path):
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


def test_an_accelerator_that_is_absent_is_a_backend_error_and_no_candidate(toy, tmp_path):
    stage, graph = toy
    path = export_stage(stage, {}, tmp_path / "toy.onnx", graph)
    with pytest.raises(BackendError, match="QNNExecutionProvider, which this build of it lacks"):
        runtime.load(path, interface(stage), {"provider": "QNNExecutionProvider"})
    assert "QNNExecutionProvider" not in {options.get("provider") for options in runtime.candidates(path)}


def test_4_bit_floats_are_repacked_without_touching_the_file_they_came_from(toy, tmp_path):
    stage, graph = toy
    path = export_stage(stage, compressed(stage, "nvfp4"), tmp_path / "somewhere.onnx", graph)
    before = path.read_bytes()
    (tmp_path / "out").mkdir()
    built = runtime.build(path, tmp_path / "out", interface(stage))
    assert path.read_bytes() == before != (tmp_path / "out" / built.file).read_bytes()


def test_a_damaged_file_is_a_backend_error(toy, tmp_path):
    stage, _ = toy
    (tmp_path / "toy.onnx").write_bytes(b"\x08\x0a" + bytes(50))
    with pytest.raises(BackendError, match="cannot load stage file"):
        runtime.load(tmp_path / "toy.onnx", interface(stage))


def test_a_file_with_other_tensors_is_a_backend_error(toy, tmp_path):
    stage, graph = toy
    path = export_stage(stage, {}, tmp_path / "toy.onnx", graph)
    other = StageInterface("toy", stage.inputs, (TensorSpec("velocity", (1, 9, 7)),))
    with pytest.raises(BackendError, match="other tensors than its manifest says .velocity."):
        runtime.load(path, other)


def test_an_unknown_or_absent_backend_says_what_to_do(monkeypatch):
    with pytest.raises(BackendError, match="no backend 'tensorrrt'; choose one of coreml, .*onnxruntime, openvino, "):
        get_backend("tensorrrt")
    from vla_edge.engine import backends

    monkeypatch.setitem(backends.BACKENDS, "absent", ("vla_edge_no_such_module", "some-runtime"))
    with pytest.raises(BackendError, match="needs the package some-runtime.*pip install some-runtime"):
        get_backend("absent")


def test_the_file_loads_without_its_own_kernels_being_in_it(toy, tmp_path):
    """What is shipped is the standard file, not a runtime's optimized one."""
    stage, graph = toy
    path = export_stage(stage, compressed(stage, "int8 static"), tmp_path / "toy.onnx", graph)
    runtime.build(path, tmp_path, interface(stage))
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
