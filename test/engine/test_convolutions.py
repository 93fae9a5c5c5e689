"""Whatever becomes of a convolution's weights, the file computes what the compressor meant."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vla_edge.compress.fake import FakeLinear
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, LowRank, QuantizedWeight
from vla_edge.engine.export import export_stage, trace
from vla_edge.engine.trace import linear_layers
from vla_edge.engine.work import stage_work
from vla_edge.policy.convolution import Convolution
from vla_edge.policy.stages import Stage, TensorSpec


class Two(torch.nn.Module):
    """A convolution of each kind, in a row; the first reads what another does too."""

    def __init__(self, axes: int):
        super().__init__()
        self.first = Convolution(4, 8, (3,) * axes, stride=2, padding=1)
        self.beside = Convolution(4, 8, (1,) * axes, stride=2)
        self.second = Convolution(8, 6, (5,) * axes, padding=2)

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
    kinds = {"float32": 3, "float16": 3, "int8": 3, "int8 static": 0, "int8 dynamic": 0, "int4": 0, "low rank": 0, "rescaled": 0}
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
