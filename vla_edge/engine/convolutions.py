"""Marker nodes of convolutions -> standard ONNX.

Where nothing is rounded but the weights, per channel, a convolution is the operator that every runtime has, between two
transpositions, which they cancel against each other. Otherwise it is the product over patches that the compressor takes
it for: that is what runtimes multiply as integers, and what groups of inputs that share a scale are groups of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_edge.compress.quantize.weights import CompressedLinear, QuantizedWeight


@dataclass(frozen=True)
class Shape:
    """Of a convolution, along each dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @classmethod
    def of(cls, node) -> Shape:
        """As its marker says."""
        said = {item.name: item for item in node.attribute}
        return cls(*(tuple(said[name].ints) for name in ("kernel", "stride", "padding")))

    def of_one_tap(self) -> Shape:
        """Of what follows it and sees one place."""
        none = (0,) * len(self.kernel)
        return Shape((1,) * len(self.kernel), (1,) * len(self.kernel), none)


def is_direct(layer: CompressedLinear) -> bool:
    """Whether it stays a convolution in the file."""
    if layer.activation is not None or layer.input_scale is not None:
        return False
    if layer.low_rank is not None:
        return layer.weight is None
    return not layer.quantized or layer.weight.group_size is None and layer.weight.grid.bits == 8


def is_depthwise(node) -> bool:
    """Whether a node of a traced graph is a `DepthwiseConvolution`, whose taps are part of the graph."""
    return node.op_type == "Conv" and any(said.name == "group" and said.i > 1 for said in node.attribute)


def convolve(builder, name: str, call: str, x: str, layer: CompressedLinear, shape: Shape, out: str) -> None:
    """The operator itself, x and `out` channels last; of a layer that is its factors, one after the other.

    Args:
        builder: of `engine.lower`. name: of the layer. call: of this use of it.
    """
    if layer.low_rank is not None:
        down, up = CompressedLinear(layer.low_rank.down), CompressedLinear(layer.low_rank.up, layer.bias)
        convolve(builder, f"{name}.down", f"{call}.down", x, down, shape, f"{call}.thin")
        convolve(builder, f"{name}.up", f"{call}.up", f"{call}.thin", up, shape.of_one_tap(), out)
        return
    axes = len(shape.kernel)
    last = [0, *range(2, axes + 2), 1]
    inputs = [builder.transposed(x, [0, axes + 1, *range(1, axes + 1)]), _kernel(builder, name, call, layer, shape)]
    if layer.bias is not None:
        inputs.append(builder.constant(f"{name}.bias", layer.bias))
    builder.node(
        "Conv", inputs, [f"{call}.product"], call,
        kernel_shape=list(shape.kernel), strides=list(shape.stride), pads=[*shape.padding, *shape.padding],
    )  # fmt: skip
    builder.node("Transpose", [f"{call}.product"], [out], f"{call}.back", perm=last)


def patches(builder, call: str, x: str, shape: Shape) -> str:
    """Name of the (..., taps * channels) tensor that `policy.convolution.patches` makes."""
    if any(shape.padding):
        # a number before and after each axis, none for the batch and the channels
        around = [0, *shape.padding, 0] * 2
        pads = builder.constant(f"{call}.pads", np.array(around, np.int64))
        builder.node("Pad", [x, pads], [f"{call}.padded"], f"{call}.pad")
        x = f"{call}.padded"
    for axis, (taps, step) in enumerate(zip(shape.kernel, shape.stride, strict=True), 1):
        if taps == step == 1:
            continue
        parts = []
        for tap in range(taps):
            # so that all taps see as many places: up to as far from the end as the last tap is
            until = tap - taps + 1 or np.iinfo(np.int64).max
            bounds = [tap, until, axis, step]
            names = [
                builder.constant(f"{call}.{kind}{value}", np.array([value], np.int64))
                for kind, value in zip(("from", "to", "axis", "step"), bounds)
            ]
            parts.append(f"{call}.tap{axis}.{tap}")
            builder.node("Slice", [x, *names], [parts[-1]], parts[-1])
        x = f"{call}.seen{axis}"
        builder.node("Concat", parts, [x], f"{x}.concat", axis=-1)
    return x


def _kernel(builder, name: str, call: str, layer: CompressedLinear, shape: Shape) -> str:
    """Name of the (outputs, channels, *kernel) float32 tensor."""
    axes = len(shape.kernel)

    def arranged(matrix: np.ndarray) -> np.ndarray:
        # taps of later dimensions lie outside those of earlier ones, channels inside
        whole = matrix.reshape(len(matrix), *reversed(shape.kernel), -1)
        return whole.transpose(0, axes + 1, *range(axes, 0, -1))

    if not layer.quantized:
        return builder.float_matrix(f"{name}.weight", f"{call}.weight", arranged(layer.weight))
    weight: QuantizedWeight = layer.weight
    stored = builder.constant(f"{name}.weight", arranged(weight.values))
    operands = [stored, builder.constant(f"{name}.scale", weight.steps)]
    if weight.format == "int8":
        operands.append(builder.constant(f"{name}.zero_point", np.zeros(len(weight.steps), np.int8)))
    builder.node("DequantizeLinear", operands, [f"{call}.weight.float"], f"{call}.weight.dequantize", axis=0)
    return f"{call}.weight.float"
