"""PyTorch reads a stage's file and computes what it says; nothing but data is taken from it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from toy import PRECISIONS, compressed, interface, toy_inputs

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.export import export_stage
from vla_edge.policy.stages import TensorSpec

runtime = get_backend("torch")


def loaded_and_expected(toy, path, precision, options=None):
    stage, graph = toy
    export_stage(stage, compressed(stage, precision), path, graph)
    evaluator = ReferenceEvaluator(str(path))
    expected = dict(zip(evaluator.output_names, evaluator.run(None, toy_inputs())))
    return runtime.load(path, interface(stage), options), expected


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp8 static"])
def test_it_agrees_with_the_reference_evaluator(toy, tmp_path, precision):
    loaded, expected = loaded_and_expected(toy, tmp_path / "toy.onnx", precision)
    for name, value in loaded.run(toy_inputs()).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5)


def test_in_bfloat16_it_stays_near(toy, tmp_path):
    loaded, expected = loaded_and_expected(toy, tmp_path / "toy.onnx", "float32", {"precision": "bf16"})
    for name, value in loaded.run(toy_inputs()).items():
        assert 1e-6 < np.abs(value - expected[name]).max() / np.abs(expected[name]).max() < 0.02


@pytest.mark.parametrize("gain, tried", [(0.1, {"f32"}), (3.0, {"f32", "bf16"})])
def test_bfloat16_is_tried_where_the_processor_has_it(toy, tmp_path, monkeypatch, gain, tried):
    """Without its instructions a product takes hundreds of times as long, and a build would not end."""
    from vla_edge.engine.backends import torch as module

    monkeypatch.setattr(module, "bfloat16_gain", lambda: gain)
    assert {way.get("precision", "f32") for way in runtime.candidates(tmp_path / "any.onnx")} == tried


def test_every_stage_of_the_policy_is_read(checkpoint, data, traced, tmp_path, monkeypatch):
    """Of an int8 bundle: with its rounding, so as near as rounding to either side allows."""
    from tiny import make_observations

    from vla_edge.engine.build import build
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.runner import Runner

    # of operators in the standard alone
    monkeypatch.setattr("vla_edge.engine.native.rewrite.library", lambda: None)
    bundle = build(checkpoint, "int8", "onnxruntime", tmp_path / "int8", data, traced=traced)
    reference = Runner.from_bundle(bundle)
    read = {
        entry.interface.name: runtime.load(bundle / entry.file, entry.interface) for entry in Bundle.load(bundle).stages
    }
    for name, inputs in reference.stage_inputs(make_observations(1)[0]):
        expected = reference.stages[name].run(inputs)
        for output, value in read[name].run(inputs).items():
            np.testing.assert_allclose(value, expected[output], atol=0.02, err_msg=f"{name} {output}")


def test_binding_writes_in_place_and_threads_are_given_back(toy, tmp_path):
    import torch

    loaded, expected = loaded_and_expected(toy, tmp_path / "toy.onnx", "int8", {"threads": 1})
    outputs = {spec.name: spec.zeros() for spec in loaded.interface.outputs}
    before = torch.get_num_threads()
    loaded.bind(toy_inputs(), outputs)()
    assert torch.get_num_threads() == before
    np.testing.assert_allclose(outputs["y"], expected["y"], atol=1e-5)


def test_rounding_that_it_cannot_imitate_is_refused(toy, tmp_path):
    with pytest.raises(BackendError, match="rounds inputs to 8-bit integers only"):
        loaded_and_expected(toy, tmp_path / "toy.onnx", "fp8 static")


def test_an_unknown_operator_is_named(toy, tmp_path):
    stage, graph = toy
    path = export_stage(stage, {}, tmp_path / "toy.onnx", graph)
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Hardmax"
    onnx.save(model, path)
    with pytest.raises(BackendError, match="does not know the operator Hardmax"):
        runtime.load(path, interface(stage))


def test_a_damaged_file_other_tensors_and_a_device_that_is_absent_are_backend_errors(toy, tmp_path):
    import torch

    stage, graph = toy
    (tmp_path / "bad.onnx").write_bytes(b"\x80\x04pickle" + bytes(50))
    with pytest.raises(BackendError, match="cannot read stage file"):
        runtime.load(tmp_path / "bad.onnx", interface(stage))
    path = export_stage(stage, {}, tmp_path / "toy.onnx", graph)
    with pytest.raises(BackendError, match="other tensors"):
        runtime.load(path, StageInterface("toy", stage.inputs, (TensorSpec("velocity", (1, 9, 7)),)))
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="device 'cuda', which is not here"):
            runtime.load(path, interface(stage), {"device": "cuda"})


@pytest.mark.gpu
def test_on_a_gpu_the_stage_is_one_graph(toy, tmp_path):
    loaded, expected = loaded_and_expected(toy, tmp_path / "toy.onnx", "float32", {"device": "cuda"})
    for _ in range(2):
        for name, value in loaded.run(toy_inputs()).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-3)
