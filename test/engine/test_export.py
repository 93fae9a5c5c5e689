"""The file means what the plan says, in standard operators, whoever evaluates it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from toy import PRECISIONS, TOKENS, compressed, interface, toy_inputs, words_stage

from vla_edge.compress.fake import installed
from vla_edge.compress.quantize.packing import pack_4_bits
from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.engine import export
from vla_edge.engine.backends import get_backend
from vla_edge.engine.export import ConstantStore, ExportError, as_it_is, export_stage, linear_layers, trace
from vla_edge.engine.lower import lower
from vla_edge.policy.stages import Stage, TensorSpec


def rounded(x: np.ndarray, activation) -> np.ndarray:
    """Inputs on their grid, written down once more."""
    if activation is None:
        return x
    if activation.format == "fp8":
        return np.clip(x / activation.scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(float) * activation.scale
    if activation.format == "int4":
        groups = x.reshape(*x.shape[:-1], -1, activation.group_size)
        step = np.maximum(np.abs(groups).max(-1, keepdims=True) / 7, 1e-30)
        return (np.rint(groups / step) * step).reshape(x.shape)
    scale, zero = activation.scale, activation.zero_point
    if activation.kind == "dynamic":
        low, high = min(x.min(), 0), max(x.max(), 0)
        scale = (high - low) / 255
        zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def expected(layers: dict[str, CompressedLinear], inputs: dict, stage: Stage) -> dict[str, np.ndarray]:
    """The toy stage written down once more, in float64 numpy, with rounding where the plan has rounding."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        layer = layers[name]
        scaled = x if layer.input_scale is None else x * layer.input_scale
        out = rounded(scaled, layer.activation) @ layer.dense_weight().astype(np.float64).T
        if layer.low_rank is not None:
            out = out + x @ layer.low_rank.dequantize().astype(np.float64).T
        return out if layer.bias is None else out + layer.bias

    x, shift = inputs["x"].astype(np.float64), inputs["shift"].astype(np.float64)
    scores = linear("q", x) @ linear("k", x).transpose(0, 2, 1) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    h = weights @ linear("v", x) + shift[:, None]
    norm = stage.module.norm
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + norm.eps)
    h = h * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    return {"y": linear("inner.down", np.maximum(linear("up", h), 0)), "h": h}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_file_computes_what_the_plan_says(toy, tmp_path, precision):
    stage, graph = toy
    layers, inputs = compressed(stage, precision), toy_inputs()
    path = export_stage(stage, layers, tmp_path / "toy.onnx", graph)
    names = [spec.name for spec in stage.outputs]
    got = dict(zip(names, ReferenceEvaluator(str(path)).run(names, inputs)))
    for name, value in expected(layers, inputs, stage).items():
        # where an input lies between two points of its grid, float32 may fall on the other side: one step of few values
        tolerance = 2e-5 if layers["q"].activation is None else 3e-2 if "int8" in precision else 0.3
        np.testing.assert_allclose(got[name], value, atol=tolerance, err_msg=name)
        assert np.abs(got[name] - value).mean() < (1e-5 if tolerance < 1e-3 else 2e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_standard_operators_are_in_the_file(toy, tmp_path, precision):
    stage, graph = toy
    model = onnx.load(export_stage(stage, compressed(stage, precision), tmp_path / "toy.onnx", graph))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23 if "nvfp4" in precision else 21)]
    assert {node.domain for node in model.graph.node} == {""}


def test_integers_are_stored_as_integers(toy, tmp_path):
    stage, graph = toy
    sizes = {}
    for precision in ("float32", "int8", "int4", "fp8", "nvfp4"):
        model = onnx.load(export_stage(stage, compressed(stage, precision), tmp_path / "toy.onnx", graph))
        weights = [c for c in model.graph.initializer if c.name.endswith(".weight") and len(c.dims) == 2]
        sizes[precision] = sum(len(c.raw_data) for c in weights)
        kinds = {c.data_type for c in weights}
        named = {"float32": "FLOAT", "fp8": "FLOAT8E4M3FN", "nvfp4": "FLOAT4E2M1"}
        assert kinds == {getattr(onnx.TensorProto, named.get(precision, precision.upper()))}
    assert sizes["int8"] * 4 == sizes["fp8"] * 4 == sizes["float32"]
    assert sizes["int4"] * 8 == pytest.approx(sizes["float32"], abs=8) == sizes["nvfp4"] * 8


def test_layers_that_read_the_same_tensor_share_its_rounding(toy):
    stage, graph = toy
    static = [node.op_type for node in lower(graph, compressed(stage, "int8 static"), {}, "toy").graph.node]
    dynamic = [node.op_type for node in lower(graph, compressed(stage, "int8 dynamic"), {}, "toy").graph.node]
    # five layers read three tensors
    assert static.count("QuantizeLinear") == dynamic.count("DynamicQuantizeLinear") == 3
    assert dynamic.count("MatMulInteger") == 5


def test_a_layer_that_is_called_twice_is_stored_once(tmp_path):
    import torch
    from torch import nn

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return (self.layer(torch.relu(self.layer(x))),)

    torch.manual_seed(0)
    stage = Stage("toy", Twice(), (TensorSpec("x", (1, 16)),), (TensorSpec("y", (1, 16)),))
    x = np.linspace(-1, 1, 16, dtype=np.float32)[None]
    graph = trace(stage)
    for precision in PRECISIONS:
        layers = compressed(stage, precision)
        path = export_stage(stage, layers, tmp_path / "toy.onnx", graph)
        names = [constant.name for constant in onnx.load(path).graph.initializer]
        assert names.count("layer.down" if precision == "lowrank" else "layer.weight") == 1
        assert not [name for name in names if "@" in name]
        with torch.no_grad(), installed(linear_layers(stage), layers):
            expected = stage.module(torch.from_numpy(x))[0].numpy()
        np.testing.assert_allclose(ReferenceEvaluator(str(path)).run(None, {"x": x})[0], expected, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_file_computes_what_the_compressed_policy_computes_in_pytorch(toy, tmp_path, precision):
    import torch

    stage, graph = toy
    layers, inputs = compressed(stage, precision), toy_inputs()
    path = export_stage(stage, layers, tmp_path / "toy.onnx", graph)
    with torch.no_grad(), installed(linear_layers(stage), layers):
        expected = stage.module(*(torch.from_numpy(inputs[spec.name]) for spec in stage.inputs))
        plain = torch.nn.Linear.forward
        assert all(module.forward.__func__ is not plain for module in linear_layers(stage).values())
    assert all("forward" not in vars(module) for module in linear_layers(stage).values())
    for got, value in zip(ReferenceEvaluator(str(path)).run(None, inputs), expected):
        difference = np.abs(got - value.numpy())
        # a value between two points of a grid may fall either way; hardly any does
        assert np.quantile(difference, 0.95) < 2e-5, precision


def test_the_same_stage_gives_the_same_bytes(toy, tmp_path):
    stage, graph = toy
    first = export_stage(stage, compressed(stage, "int8 static"), tmp_path / "a.onnx", graph).read_bytes()
    second = export_stage(stage, compressed(stage, "int8 static"), tmp_path / "b.onnx").read_bytes()
    assert first == second


def test_the_file_says_nothing_about_where_it_was_made(toy, tmp_path):
    stage, graph = toy
    content = export_stage(stage, {}, tmp_path / "toy.onnx", graph).read_bytes()
    assert b".py" not in content and b"site-packages" not in content and b"namespace" not in content


def test_a_layer_the_graph_never_calls_is_an_error(tmp_path):
    import torch
    from torch import nn

    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return (self.used(x),)

    stage = Stage("toy", Forgetful(), (TensorSpec("x", (1, 4)),), (TensorSpec("y", (1, 4)),))
    with pytest.raises(ExportError, match="'spare' of stage 'toy' does not appear"):
        export_stage(stage, {}, tmp_path / "toy.onnx")
    assert torch.is_tensor(stage.module.used.weight), "exporting must not change the policy"


def test_a_large_product_that_is_no_linear_layer_is_an_error(tmp_path):
    import torch
    from torch import nn

    class Anonymous(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return (x @ self.matrix,)

    stage = Stage("toy", Anonymous(), (TensorSpec("x", (1, 64)),), (TensorSpec("y", (1, 64)),))
    with pytest.raises(ExportError, match="without an nn.Linear"):
        export_stage(stage, {}, tmp_path / "toy.onnx")


def test_a_plan_for_a_layer_that_is_not_there_is_an_error(toy, tmp_path):
    stage, graph = toy
    with pytest.raises(ExportError, match="no linear layer 'missing'"):
        export_stage(stage, {"missing": as_it_is(stage.module.q)}, tmp_path / "toy.onnx", graph)


def test_large_constants_lie_beside_the_file_and_those_that_stages_share_only_once(toy, tmp_path, monkeypatch):
    stage, traced = toy
    wide = {name: torch.nn.Linear(layer.in_features, layer.out_features) for name, layer in linear_layers(stage).items()}
    layers = {name: as_it_is(layer) for name, layer in wide.items()}
    whole = export_stage(stage, layers, tmp_path / "whole.onnx", traced)
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    monkeypatch.setattr(export, "PAGE", 256)
    store = ConstantStore(tmp_path)
    other = Stage("other", stage.module, stage.inputs, stage.outputs, shares="toy")
    files = [export_stage(s, layers, tmp_path / f"{s.name}.onnx", traced, store) for s in (stage, other)]
    assert sorted(path.name for path in tmp_path.glob("*.weights")) == ["toy.weights"]
    assert (tmp_path / "toy.weights").stat().st_size > 0.8 * sum(4 * w.weight.numel() for w in wide.values())
    assert all(path.stat().st_size < whole.stat().st_size / 2 for path in files)
    names = [spec.name for spec in stage.outputs]
    results = [onnxruntime.InferenceSession(str(path)).run(names, toy_inputs()) for path in (whole, *files)]
    for found in results[1:]:
        for ours, theirs in zip(found, results[0]):
            np.testing.assert_array_equal(ours, theirs)


def test_packing_follows_the_standard():
    values = np.array([[-7, 7, 0], [1, -1, 3]], np.int8)
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, values.shape, pack_4_bits(values).tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), values)
    odd = np.array([[-3, 2, 5]], np.int8)
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, odd.shape, pack_4_bits(odd).tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), odd)


def test_values_come_when_the_graph_is_lowered(tmp_path):
    stage = words_stage()
    traced = trace(stage)
    assert traced.ByteSize() < stage.module.table.weight.nbytes / 4
    for scale in (1.0, 2.0):  # of one graph
        with torch.no_grad():
            stage.module.table.weight.mul_(scale)
            wanted = stage.module(torch.from_numpy(TOKENS))[0].numpy()
        session = onnxruntime.InferenceSession(export_stage(stage, {}, tmp_path / "words.onnx", traced))
        np.testing.assert_allclose(session.run(None, {"tokens": TOKENS})[0], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_a_table_that_bfloat16_holds_is_stored_in_it_and_loses_nothing(tmp_path, monkeypatch, name):
    stage = words_stage()
    with torch.no_grad():
        wanted = stage.module(torch.from_numpy(TOKENS))[0].numpy()
    whole = export_stage(stage, {}, tmp_path / "whole.onnx")  # a small one is not worth it
    monkeypatch.setattr("vla_edge.engine.lower.LEAST_TABLE", 1000)
    half = export_stage(stage, {}, tmp_path / "half.onnx")
    table = stage.module.table.weight
    assert whole.stat().st_size - half.stat().st_size == pytest.approx(table.nbytes / 2, rel=0.01)
    backend = get_backend(name)
    built = backend.build(half, tmp_path, interface(stage), {"threads": 1})
    found = backend.load(tmp_path / built.file, interface(stage)).run({"tokens": TOKENS})["y"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    with torch.no_grad():
        table[7, 7] += 2.0**-10 * table[7, 7]  # which takes more digits
    assert export_stage(stage, {}, tmp_path / "half.onnx").stat().st_size == whole.stat().st_size


