"""Products with 4-bit weights by a kernel of our own, `native/`, which ONNX Runtime runs as an operator.

Inputs are rounded to 8 bits, each group of channels that shares a scale of the weights with a step of its own, as in
ONNX Runtime's and llama.cpp's integer kernels. The weights lie in the order in which the processor reads them, so that
one row goes at the speed of the memory and many at that of its integer units. Installing the package compiles the kernel
where there is a C compiler; without it runtimes use their own.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

DOMAIN, OPERATOR = "vla_edge", "Int4MatMul"
# of native/int4_products.h
BLOCK, INPUTS = 64, 8


@lru_cache(maxsize=1)
def library() -> Path | None:
    """The compiled kernel where it is installed and this processor can run it, else None."""
    found = sorted((Path(__file__).parent / "native").glob("_int4*.so"))
    if not found:
        return None
    try:
        kernel = ctypes.CDLL(str(found[-1]))
    except OSError:  # built for another computer
        return None
    return found[-1] if kernel.vla_edge_int4_runs(None) else None


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
    """Products of a graph (`onnx.GraphProto`) that the kernel can compute: with constant weights of 4 bits in groups."""
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


def use_kernel(path: Path) -> None:
    """Rewrite a stage file so that the kernel computes its 4-bit products.

    One layer's weights are in memory at a time. Where the file keeps large constants beside it, the new one does too,
    those of each layer in a file that is named by what it holds: stages with the same weights share them.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    graph, directory = model.graph, path.parent
    earlier = {constant.name for constant in graph.initializer if constant.data_location == constant.EXTERNAL}
    constants = {constant.name: constant for constant in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    shapes = {value.name: value for value in graph.value_info}
    known, packed = [], set()

    def value(name: str) -> np.ndarray:
        if name in constants:
            return onnx.numpy_helper.to_array(_inside(constants[name], directory))
        return value(makers[name].input[0])  # scales in fewer bits, behind their Cast

    for node in takes(graph):
        source = makers[node.input[1]]
        weights, scales = source.input
        operands = [f"{weights}.{part}" for part in ("blocks", "shares", "largest")]
        if weights not in packed:
            packed.add(weights)
            arrays = pack(value(weights).astype(np.int8), value(scales).astype(np.float32))
            made = [onnx.numpy_helper.from_array(array, name) for name, array in zip(operands, arrays)]
            if weights in earlier:
                _move_out(made, directory)
            graph.initializer.extend(made)
        told = {attribute.name: attribute.i for attribute in source.attribute}
        product = onnx.helper.make_node(
            OPERATOR, [node.input[0], *operands], list(node.output), node.name, domain=DOMAIN,
            width=constants[weights].dims[1], group=told["block_size"],
        )  # fmt: skip
        node.CopyFrom(product)
        known += [shapes[name] for name in node.output if name in shapes]
    _drop_unread(graph)
    for constant in graph.initializer:
        if constant.name in earlier:  # the file that it lies in is mostly what is not needed any more
            constant.CopyFrom(_inside(constant, directory))
            _move_out([constant], directory)
    del graph.value_info[:]
    graph.value_info.extend(known)  # the runtime cannot tell the shape of what this operator gives
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    path.unlink()  # it may share its blocks with the file it was made of
    path.write_bytes(model.SerializeToString(deterministic=True))


def _inside(constant, directory: Path):
    """A constant with its data, which may lie in a file beside it.

    (What onnx has for this refuses a file that has a second name, as those of a build do.)
    """
    if constant.data_location != constant.EXTERNAL:
        return constant
    told = {entry.key: entry.value for entry in constant.external_data}
    read = type(constant)(name=constant.name, data_type=constant.data_type, dims=constant.dims)
    with open(directory / told["location"], "rb") as file:
        file.seek(int(told.get("offset", 0)))
        read.raw_data = file.read(int(told["length"]))
    return read


def _move_out(constants: Sequence, directory: Path) -> None:
    """The data of constants into one file."""
    from onnx.external_data_helper import set_external_data

    from vla_edge.engine.export import PAGE

    data = b"".join(constant.raw_data.ljust(-(-len(constant.raw_data) // PAGE) * PAGE, b"\0") for constant in constants)
    file = directory / f"{hashlib.sha256(data).hexdigest()[:16]}.weights"
    file.write_bytes(data)
    offset = 0
    for constant in constants:
        size = len(constant.raw_data)
        set_external_data(constant, file.name, offset, size)
        constant.ClearField("raw_data")
        constant.data_location = constant.EXTERNAL
        offset += -(-size // PAGE) * PAGE


def _drop_unread(graph) -> None:
    """Remove nodes and constants that nothing reads any more."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        unread = [node for node in graph.node if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    for constant in [constant for constant in graph.initializer if constant.name not in read]:
        graph.initializer.remove(constant)
