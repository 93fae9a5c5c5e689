"""Products with 4-bit weights: packing for the kernel, and the products of a stage file that it takes.

Inputs are rounded to 8 bits, each group of channels that shares a scale of the weights with a step of its own, as in
ONNX Runtime's and llama.cpp's integer kernels. The weights lie in the order in which the processor reads them, so that
one row goes at the speed of the memory and many at that of its integer units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from vla_edge.engine.native import DOMAIN

OPERATOR = "Int4MatMul"
# of int4_products.h
BLOCK, INPUTS = 64, 8


def pack(values: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights and scales in the kernel's order, see `native/int4_products.h`.

    Args:
        values: (inputs, outputs) int8 of -8 to 7. scales: (groups, outputs) float32.

    Returns:
        (blocks, inputs / 8, 256) uint8, (blocks, groups, 64) float16 and (64 blocks,) float32.

    Raises:
        ValueError: groups are not of a multiple of 8 inputs.
    """
    inputs, outputs = values.shape
    groups = len(scales)
    if inputs % groups or inputs // groups % INPUTS:
        raise ValueError(f"{inputs} inputs in {groups} groups; the kernel takes groups of a multiple of {INPUTS}")
    blocks = -(-outputs // BLOCK)
    missing = blocks * BLOCK - outputs
    codes = np.pad((values + np.int8(8)).astype(np.uint8), ((0, 0), (0, missing)), constant_values=8)
    # (chunk, half, input of four, block, output) -> (block, chunk, output, input of four, half)
    halves = codes.reshape(inputs // INPUTS, 2, INPUTS // 2, blocks, BLOCK).transpose(3, 0, 4, 2, 1)
    packed = halves[..., 0] | halves[..., 1] << 4
    padded = np.pad(scales.astype(np.float32), ((0, 0), (0, missing)))
    largest = np.abs(padded).max(0)
    shares = padded / np.where(largest, largest, 1)
    in_order = shares.reshape(groups, blocks, BLOCK).transpose(1, 0, 2).astype(np.float16)
    return packed.reshape(blocks, inputs // INPUTS, -1), np.ascontiguousarray(in_order), largest


def takes(graph) -> list:
    """Products of a graph (`onnx.GraphProto`) that the kernel can compute: constant weights of 4 bits in groups."""
    import onnx

    constants = {constant.name: constant for constant in graph.initializer}
    packed = {}
    for node in graph.node:
        weights = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" and len(node.input) == 2 else None
        if weights is not None and weights.data_type == onnx.TensorProto.INT4 and len(weights.dims) == 2:
            told = {attribute.name: attribute.i for attribute in node.attribute}
            group = told.get("block_size", 0)
            if group and told.get("axis", 1) in (0, -2) and not group % INPUTS and not weights.dims[0] % group:
                packed[node.output[0]] = node
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in packed]


def replace(graph, value: Callable[[str], np.ndarray]) -> Iterator[tuple[str, list]]:
    """Have the kernel compute every product that it takes, one after the other.

    Args:
        value: a constant's value by its name.

    Yields:
        The name of weights that are read no more, and the constants (`onnx.TensorProto`) that take their place; those
        of one layer are in memory at a time.
    """
    import onnx

    constants = {constant.name: constant for constant in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    packed = set()
    for node in takes(graph):
        source = makers[node.input[1]]
        weights, scales = source.input
        if scales not in constants:  # in fewer bits, behind their Cast
            scales = makers[scales].input[0]
        operands = [f"{weights}.{part}" for part in ("blocks", "shares", "largest")]
        told = {attribute.name: attribute.i for attribute in source.attribute}
        product = onnx.helper.make_node(
            OPERATOR, [node.input[0], *operands], list(node.output), node.name, domain=DOMAIN,
            width=constants[weights].dims[1], group=told["block_size"],
        )  # fmt: skip
        node.CopyFrom(product)
        if weights not in packed:
            packed.add(weights)
            arrays = pack(value(weights).astype(np.int8), value(scales).astype(np.float32))
            yield weights, [onnx.numpy_helper.from_array(array, name) for name, array in zip(operands, arrays)]
