"""A stage file with the nodes that kernels of our own compute replaced by their operators."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vla_edge.engine.export import PAGE, leave_to
from vla_edge.engine.native import DOMAIN, attention, cached_attention, int4_products, int8_products, library, rotary
from vla_edge.engine.onnx_graph import needed, set_nodes

PRODUCTS = (int4_products, int8_products)
# what a stage has that a recipe rounds
_ROUNDING = {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"}


def helps(model) -> bool:
    """Whether the kernels are here, and something for them in a stage (`onnx.ModelProto`).

    A stage that its recipe left in full precision stays in it, its attention too.
    """
    import onnx

    if library() is None or not any(node.op_type in _ROUNDING for node in model.graph.node):
        return False
    if any(products.takes(model.graph) for products in PRODUCTS):
        return True
    return bool(attention.Attentions(onnx.shape_inference.infer_shapes(model).graph).found)


def rounds_inputs(model) -> bool:
    """Whether the kernels round inputs of layers to 8 bits that a stage (`onnx.ModelProto`) leaves as they are. Otherwise they
    round finer than it asks for: rows of inputs on grids of their own, attention in 16 bits."""
    layers = int8_products.takes(model.graph)
    floats = any(product.first.op_type == "MatMul" for layer in layers for product in layer.products)
    return floats or bool(int4_products.takes(model.graph))


def use_kernels(path: Path) -> None:
    """Rewrite a stage file so that the kernels compute what they can.

    One layer's weights are in memory at a time. Where the file keeps large constants beside it, the new one does too,
    those of each layer in a file that is named by what it holds: stages with the same weights share them.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    graph, directory = model.graph, path.parent
    constants = {constant.name: constant for constant in graph.initializer}
    outside = {name for name, constant in constants.items() if constant.data_location == constant.EXTERNAL}
    shapes = {value.name: value for value in graph.value_info}
    moved = False

    def value(name: str):
        return onnx.numpy_helper.to_array(_inside(constants[name], directory))

    for products in PRODUCTS:
        for weights, made in products.replace(graph, value):
            if weights in outside:
                _move_out(made, directory)
                moved = True
            graph.initializer.extend(made)
    rotary.replace(graph)
    cached_attention.replace(graph)
    nodes, read = needed(attention.Attentions(graph).replaced(), (value.name for value in graph.output))
    set_nodes(graph, nodes)
    for place in reversed(range(len(graph.initializer))):
        constant = graph.initializer[place]
        if constant.name not in read:
            del graph.initializer[place]
        elif moved and constant.name in outside:  # the file that it lies in is mostly what is not needed any more
            constant.CopyFrom(_inside(constant, directory))
            _move_out([constant], directory)
    del graph.value_info[:]
    # the runtime cannot tell the shapes of what these operators give
    own = [name for node in graph.node if node.domain == DOMAIN for name in node.output if name in shapes]
    graph.value_info.extend(shapes[name] for name in own)
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
    data = b"".join(constant.raw_data.ljust(-(-len(constant.raw_data) // PAGE) * PAGE, b"\0") for constant in constants)
    file = directory / f"{hashlib.sha256(data).hexdigest()[:16]}.weights"
    file.write_bytes(data)
    offset = 0
    for constant in constants:
        end = offset + len(constant.raw_data)
        leave_to(constant, file.name, offset)
        offset = -(-end // PAGE) * PAGE
