"""Every precision we write is built ahead of time for GPUs that have it, with no GPU at hand, or refused with reasons.

Tensor cores differ by generation: 8.6 stands for Orin's precisions, 8.9 has FP8, 12.0 has FP4 as well. What is built
cannot be run here; that the numbers are right is held by the other runtimes of the same files.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from toy import PRECISIONS, compressed, even_stage, interface, toy_inputs, words_stage

from vla_edge.engine.backends import BackendError, get_backend
from vla_edge.engine.backends.tensorrt_plan import read, refusals, two_to_four
from vla_edge.engine.export import export_stage, trace

pytestmark = pytest.mark.peers
trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
runtime = get_backend("tensorrt_rtx")


@pytest.fixture(scope="module")
def even():
    stage = even_stage()
    return stage, trace(stage)


def builds(model, capability: int) -> bool:
    """Whether the library itself builds `model`, asked without our refusals."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, logger).parse(model.SerializeToString()):
        return False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_refused_is_what_the_builder_refuses(even, tmp_path, precision):
    stage, graph = even
    path = export_stage(stage, compressed(stage, precision), tmp_path / "even.onnx", graph)
    model = read(path)
    for capability in (86, 89, 120):
        reasons = refusals(model, capability)
        assert bool(reasons) != builds(model, capability), (capability, reasons)
        options = {"compute_capability": f"{capability / 10:.1f}"}
        if reasons:
            with pytest.raises(BackendError, match=reasons[0][:20]):
                runtime.build(path, tmp_path, interface(stage), options)
        else:
            built = runtime.build(path, tmp_path, interface(stage), options)
            assert (tmp_path / built.file).stat().st_size > 1000
            assert built.options["built_by"] == trt.__version__
    negative = precision == "int8 static foreign"
    assert bool(refusals(model, 120)) == ("int8 dynamic" in precision or negative)


def test_a_table_in_bfloat16_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_edge.engine.lower.LEAST_TABLE", 1000)
    model = read(export_stage(words_stage(), {}, tmp_path / "words.onnx"))
    assert not refusals(model, 86) and builds(model, 86)


def test_an_odd_number_of_4_bit_values_is_refused_and_the_builder_agrees(toy, tmp_path):
    stage, graph = toy
    model = read(export_stage(stage, compressed(stage, "int4"), tmp_path / "toy.onnx", graph))
    assert any("odd number of 4-bit values" in reason for reason in refusals(model, 86)) and not builds(model, 86)


def test_ranges_become_symmetric_and_stay_as_wide(toy, tmp_path):
    stage, graph = toy
    path = export_stage(stage, compressed(stage, "int8 static"), tmp_path / "toy.onnx", graph)
    onnx.save(read(path), tmp_path / "symmetric.onnx")
    reference = get_backend("onnxruntime")
    exact = export_stage(stage, {}, tmp_path / "exact.onnx", graph)
    ours, theirs, full = (
        reference.load(file, interface(stage), {"fuse_bias": False}).run(toy_inputs())
        for file in (tmp_path / "symmetric.onnx", path, exact)
    )
    for name in ours:
        assert 0 < np.linalg.norm(ours[name] - full[name]) < 2.5 * np.linalg.norm(theirs[name] - full[name])


def test_two_zeros_in_each_four_are_recognized(even, tmp_path):
    stage, graph = even
    dense = read(export_stage(stage, {}, tmp_path / "even.onnx", graph))
    assert not two_to_four(dense)
    sparse = onnx.ModelProto()
    sparse.CopyFrom(dense)
    for constant in sparse.graph.initializer:
        if len(constant.dims) == 2:
            values = onnx.numpy_helper.to_array(constant).copy()
            values[2::4], values[3::4] = 0, 0
            constant.CopyFrom(onnx.numpy_helper.from_array(values.repeat(4, axis=1), constant.name))
    assert two_to_four(sparse)


def test_a_gpu_that_it_does_not_build_for_or_that_is_none_is_named(even, tmp_path):
    stage, graph = even
    path = export_stage(stage, {}, tmp_path / "even.onnx", graph)
    with pytest.raises(BackendError, match="capability 8.7; it knows 7.5, 8.0, 8.6, 8.9, 12.0"):
        runtime.build(path, tmp_path, interface(stage), {"compute_capability": "8.7"})
    with pytest.raises(BackendError, match="allowed is two numbers such as 8.7"):
        runtime.build(path, tmp_path, interface(stage), {"compute_capability": "orin"})
    assert not list(tmp_path.glob("*.plan"))


def test_a_file_that_is_none_is_a_backend_error(even, tmp_path):
    (tmp_path / "even.onnx").write_bytes(b"\x08\x0a" + bytes(50))
    with pytest.raises(BackendError, match="stage file .*even.onnx cannot be read"):
        runtime.build(tmp_path / "even.onnx", tmp_path, interface(even[0]))
