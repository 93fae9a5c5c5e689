"""Products with 8-bit weights: packing for the kernel, and the products of a stage file that it takes.

Each row of inputs is rounded to 8 bits on a grid of its own, which is never coarser than the one that all rows of a
`DynamicQuantizeLinear` share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vla_edge.engine.native import DOMAIN
from vla_edge.engine.onnx_graph import Neighbours

OPERATOR = "Int8MatMul"
# of int8_products.h
BLOCK, INPUTS, MOST_INPUTS = 64, 4, 65536


def pack(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights in the kernel's order, see `native/int8_products.h`, and the sum of each output's.

    Args:
        values: (inputs, outputs) int8.

    Returns:
        (blocks, inputs / 4, 256) int8 and (64 blocks,) int32; inputs and outputs filled up with zeros.
    """
    inputs, outputs = values.shape
    padded = np.pad(values, ((0, -inputs % INPUTS), (0, -outputs % BLOCK)))
    in_order = padded.reshape(-1, INPUTS, padded.shape[1] // BLOCK, BLOCK).transpose(2, 0, 3, 1)
    blocks = np.ascontiguousarray(in_order).reshape(in_order.shape[0], in_order.shape[1], -1)
    return blocks, padded.sum(0, dtype=np.int32)


@dataclass(frozen=True)
class Found:
    """The nodes of one product.

    Attributes:
        x: input, before it is rounded. last: the node of which the output is the product's, its bias added.
        weights, scales, bias: names of constants; scales of one for each output, or one for all.
    """

    x: str
    weights: str
    scales: str
    bias: str | None
    last: object


def takes(graph) -> list[Found]:
    """Products of a graph (`onnx.GraphProto`) that the kernel can compute: constant weights of 8 bits with one step for
    each output, and inputs that are rounded on a grid found at each call, or not at all."""
    near = Neighbours(graph)
    kinds = {"MatMulInteger": _of_integers, "MatMul": _of_floats}
    found = [kinds[node.op_type](near, node) for node in graph.node if node.op_type in kinds]
    return [product for product in found if product is not None]


def _of_integers(near: Neighbours, node) -> Found | None:
    """As `lower` writes it: DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul by the product of the scales."""
    rounded, cast = near.makers.get(node.input[0]), near.below(node.output[0], "Cast")
    rescaled = None if cast is None else near.below(cast.output[0], "Mul")
    if rounded is None or rounded.op_type != "DynamicQuantizeLinear" or rescaled is None:
        return None
    step = near.makers.get(next((name for name in rescaled.input if name != cast.output[0]), ""))
    if step is None or step.op_type != "Mul" or step.input[0] != rounded.output[1]:
        return None
    return _found(near, rounded.input[0], node.input[1], step.input[1], rescaled)


def _of_floats(near: Neighbours, node) -> Found | None:
    """Inputs as they are: DequantizeLinear of the weights, each output on a grid around zero -> MatMul."""
    import onnx

    weights, x = near.makers.get(node.input[1]), near.makers.get(node.input[0])
    if weights is None or weights.op_type != "DequantizeLinear":
        return None
    if x is not None and x.op_type == "DequantizeLinear":  # on a grid that the recipe chose
        return None
    told = {attribute.name: attribute.i for attribute in weights.attribute}
    if told.get("block_size", 0) or told.get("axis", 1) not in (1, -1):
        return None
    if len(weights.input) > 2:
        zero = near.constants.get(weights.input[2])
        if zero is None or onnx.numpy_helper.to_array(zero).any():
            return None
    return _found(near, node.input[0], *weights.input[:2], node)


def _found(near: Neighbours, x: str, weights: str, scales: str, last) -> Found | None:
    import onnx

    values, steps = near.constants.get(weights), near.constants.get(scales)
    if values is None or steps is None or values.data_type != onnx.TensorProto.INT8 or len(values.dims) != 2:
        return None
    inputs, outputs = values.dims
    if inputs > MOST_INPUTS or not _is_vector(steps, outputs) and list(steps.dims) not in ([], [1]):
        return None
    added = near.below(last.output[0], "Add")
    if added is not None:
        other = next((name for name in added.input if name != last.output[0]), "")
        if _is_vector(near.constants.get(other), outputs):
            return Found(x, weights, scales, other, added)
    return Found(x, weights, scales, None, last)


def _is_vector(constant, size: int) -> bool:
    import onnx

    return constant is not None and constant.data_type == onnx.TensorProto.FLOAT and list(constant.dims) == [size]


def replace(graph, value: Callable[[str], np.ndarray]) -> Iterator[tuple[str, list]]:
    """Have the kernel compute every product that it takes, one after the other; as `int4_products.replace`."""
    import onnx

    packed = set()
    for found in takes(graph):
        values = value(found.weights)
        operands = [f"{found.weights}.{part}" for part in ("blocks", "steps", "sums")]
        product = onnx.helper.make_node(
            OPERATOR, [found.x, *operands, *([found.bias] if found.bias else [])], [found.last.output[0]],
            found.last.name, domain=DOMAIN, width=values.shape[1],
        )  # fmt: skip
        found.last.CopyFrom(product)
        if found.weights not in packed:
            packed.add(found.weights)
            blocks, sums = pack(values)
            scales = np.zeros(len(sums), np.float32)
            scales[: values.shape[1]] = value(found.scales)
            made = zip(operands, (blocks, scales, sums))
            yield found.weights, [onnx.numpy_helper.from_array(array, name) for name, array in made]
