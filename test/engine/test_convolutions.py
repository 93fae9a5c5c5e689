"""Whatever becomes of a convolution's weights, the file computes what the compressor meant."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vla_edge.compress.fake import FakeLinear
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, LowRank, QuantizedWeight
from vla_edge.engine.backends import StageInterface
from vla_edge.engine.backends.onnx_torch import read_module
from vla_edge.engine.export import export_stage, trace
from vla_edge.engine.trace import linear_layers
from vla_edge.engine.work import stage_work
from vla_edge.policy.convolution import Convolution, DepthwiseConvolution, FactoredConvolution
from vla_edge.policy.stages import Stage, TensorSpec


class Two(torch.nn.Module):
    """A convolution of each kind, in a row; the first reads what another does too, the last along one dimension."""

    def __init__(self, axes: int):
        super().__init__()
        self.first = Convolution(4, 8, (3,) * axes, stride=2, padding=1)
        self.beside = Convolution(4, 8, (1,) * axes, stride=2)
        self.second = Convolution(8, 6, (5, 3)[:axes], padding=(2, 1)[:axes])

    def forward(self, x):
        return (self.second((self.first(x) + self.beside(x)).relu()),)


def layer(module, precision: str) -> CompressedLinear:
    """Its weights in some precision."""
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    largest = {"int8": 127, "int8 static": 127, "int8 dynamic": 63, "int4": 7}.get(precision)
    if precision in ("float32", "float16"):
        return CompressedLinear(weight.astype(precision), bias)
    if precision == "low rank":
        return CompressedLinear(None, bias, low_rank=LowRank(np.ones((2, weight.shape[1]), np.float32), weight[:, :2].copy()))
    if precision == "rescaled":
        return CompressedLinear(weight, bias, input_scale=np.linspace(0.5, 2, weight.shape[1], dtype=np.float32))
    group = 4 if precision == "int4" else None
    steps = np.abs(weight.reshape(len(weight), -1, group or weight.shape[1])).max(-1) / largest
    values = np.rint(weight / np.repeat(steps, group or weight.shape[1], axis=1)).astype(np.int8)
    stored = QuantizedWeight(values, steps if group else steps[:, 0], precision.split()[0], group)
    seen = {"int8 static": ActivationQuant("static", 0.03, 128), "int8 dynamic": ActivationQuant("dynamic")}
    return CompressedLinear(stored, bias, seen.get(precision))


@pytest.mark.parametrize("axes", [1, 2])
def test_a_file_computes_its_layers_whatever_their_precision(tmp_path, axes):
    torch.manual_seed(0)
    shape = (1, *(9, 12)[:axes], 4)
    stage = Stage("vision", Two(axes), (TensorSpec("x", shape),), (TensorSpec("y", (1, *(5, 6)[:axes], 6)),))
    modules, traced, x = linear_layers(stage), trace(stage), torch.randn(shape)
    kinds = {"float32": 3, "float16": 3, "int8": 3, "int8 static": 0, "int8 dynamic": 0, "int4": 0, "low rank": 6, "rescaled": 0}
    for precision, convolutions in kinds.items():
        layers = {name: layer(module, precision) for name, module in modules.items()}
        path = export_stage(stage, layers, tmp_path / f"{precision.replace(' ', '_')}.onnx", traced)
        operators = [node.op_type for node in onnx.load(path).graph.node]
        assert operators.count("Conv") == convolutions, precision
        assert stage_work(path).all_flops >= 2 * 5 * 8 * 4 * 3
        for name, module in modules.items():
            module.forward = FakeLinear(layers[name]).forward
        with torch.no_grad():
            expected = stage.module(x)[0].numpy()
        for module in modules.values():
            del module.forward
        (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), err_msg=precision)
        if precision != "int8 dynamic":  # whose grid a rounding apart moves everything
            read = read_module(path, StageInterface(stage.name, stage.inputs, stage.outputs))(x)[0]
            np.testing.assert_allclose(read, expected, atol=2e-5 * np.abs(expected).max(), err_msg=precision)


class Factors(torch.nn.Module):
    """Along each dimension for itself, between two of one tap."""

    def __init__(self, axes: int):
        super().__init__()
        along = [tuple(3 if axis == i else 1 for i in range(axes)) for axis in range(axes)]
        middle = [DepthwiseConvolution(600, kernel, kernel, tuple(taps // 2 for taps in kernel)) for kernel in along]
        one = (1,) * axes
        self.factored = FactoredConvolution(Convolution(4, 600, one), *middle, Convolution(600, 6, one))

    def forward(self, x):
        return (self.factored(x),)


@pytest.mark.parametrize("axes", [1, 2])
def test_taps_of_each_channel_are_part_of_the_graph(tmp_path, axes):
    torch.manual_seed(0)
    module = Factors(axes)
    for part in module.factored.linear[1:-1]:
        torch.nn.init.normal_(part.weight)
    shape = (1, *(9, 12)[:axes], 4)
    stage = Stage("vision", module, (TensorSpec("x", shape),), (TensorSpec("y", (1, *(3, 4)[:axes], 6)),))
    layers = {name: layer(linear, "float32") for name, linear in linear_layers(stage).items()}
    assert list(layers) == ["factored.linear.0.linear", f"factored.linear.{axes + 1}.linear"]
    path = export_stage(stage, layers, tmp_path / "factors.onnx", trace(stage))
    assert [node.op_type for node in onnx.load(path).graph.node].count("Conv") == axes + 2
    x = torch.randn(shape)
    with torch.no_grad():
        expected = module(x)[0].numpy()
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    read = read_module(path, StageInterface(stage.name, stage.inputs, stage.outputs))(x)[0]
    for computed in (found, read.numpy()):
        np.testing.assert_allclose(computed, expected, atol=2e-5 * np.abs(expected).max())
