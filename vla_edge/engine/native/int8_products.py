"""Layers with 8-bit weights: packing for the kernel, and the nodes of a stage file that it takes the place of.

Each row of inputs is rounded to 8 bits on a grid of its own, which is never coarser than the one that all rows of a
`DynamicQuantizeLinear` share. With a product go the norm before it, other products of the same input, its bias, and
what becomes of its outputs: GELU, a gate, or the sum with what goes around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vla_edge.engine.native import DOMAIN
from vla_edge.engine.onnx_graph import Neighbours, set_nodes, tensor_shapes

OPERATOR = "Int8MatMul"
# of int8_products.h and int8_operator.c
BLOCK, INPUTS, MOST_INPUTS, MOST_LAYERS = 64, 4, 65536, 8


class Finish(IntEnum):
    """What becomes of outputs, as `Finish` in int8_products.h."""

    PLAIN = 0
    ADDED = 1
    GATED = 2
    GELU_ERF = 3
    GELU_TANH = 4


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
class Product:
    """The nodes of one product.

    Attributes:
        x: input, before it is rounded. width: of its output, which is that of node `last`, its bias added.
        first: the product itself. reader: the node that reads x.
        weights, scales, bias: names of constants; scales of one for each output, or one for all.
    """

    x: str
    weights: str
    scales: str
    bias: str | None
    width: int
    reader: object
    first: object
    last: object


@dataclass(frozen=True)
class Norm:
    """What brings the rows of `x` to one size, and where there is a `shift`, around zero."""

    x: str
    weight: str
    shift: str | None
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """Products of one input, and what goes with them.

    Attributes:
        place: the node that the operator stands for. gone: those whose outputs it gives.
    """

    products: tuple[Product, ...]
    norm: Norm | None
    finish: Finish
    added: str | None
    outputs: tuple[str, ...]
    place: object
    gone: tuple[object, ...]


def outputs_of(node, constants: Mapping[str, object]) -> int:
    """Of all layers of an operator together."""
    import onnx

    return int(onnx.numpy_helper.to_array(constants[node.input[4]]).sum())


def takes(graph) -> list[Layer]:
    """What the kernel can compute of a graph (`onnx.GraphProto` with inferred shapes): products with constant weights
    of 8 bits, one step for each output, and inputs that are rounded on a grid found at each call, or not at all."""
    near, shapes = Neighbours(graph), tensor_shapes(graph)
    kinds = {"MatMulInteger": _of_integers, "MatMul": _of_floats}
    found = [kinds[node.op_type](near, node) for node in graph.node if node.op_type in kinds]
    of_input: dict[str, list[Product]] = {}
    for product in found:
        if product is not None:
            of_input.setdefault(product.x, []).append(product)
    layers, sums = [], set()
    for products in of_input.values():
        for begin in range(0, len(products), MOST_LAYERS):
            layers.append(_layer(near, shapes, products[begin : begin + MOST_LAYERS], len(products), sums))
    return layers


def replace(graph, value: Callable[[str], np.ndarray]) -> Iterator[tuple[str, list]]:
    """Have the kernel compute every layer that it takes, one after the other; as `int4_products.replace`."""
    import onnx

    instead, gone, packed = {}, set(), set()
    for layer in takes(graph):
        source = "+".join(product.weights for product in layer.products)
        names = [f"{source}.{part}" for part in ("blocks", "steps", "sums", "widths")]
        bias = f"{source}.bias" if any(product.bias for product in layer.products) else ""
        norm = layer.norm or Norm(layer.products[0].x, "", "", 0.0)
        operands = [norm.x, *names, bias, norm.weight, norm.shift or "", layer.added or ""]
        while not operands[-1]:
            operands.pop()
        gone |= {node.output[0] for node in layer.gone}
        instead[layer.place.output[0]] = onnx.helper.make_node(
            OPERATOR, operands, list(layer.outputs), layer.products[0].first.name, domain=DOMAIN,
            finish=int(layer.finish), epsilon=norm.epsilon,
        )  # fmt: skip
        if source not in packed:
            packed.add(source)
            yield layer.products[0].weights, _constants(source, layer.products, value)
    gone -= set(instead)
    nodes = [instead.get(node.output[0], node) for node in graph.node if not gone.intersection(node.output)]
    set_nodes(graph, nodes)


def _constants(source: str, products: Sequence[Product], value: Callable[[str], np.ndarray]) -> list:
    import onnx

    blocks, sums, steps, biases = [], [], [], []
    for product in products:
        packed, sum_ = pack(value(product.weights))
        blocks.append(packed)
        sums.append(sum_)
        scales = np.zeros(len(sum_), np.float32)
        scales[: product.width] = value(product.scales)
        steps.append(scales)
        biases.append(np.zeros(product.width, np.float32) if product.bias is None else value(product.bias))
    arrays = {
        "blocks": np.concatenate(blocks), "steps": np.concatenate(steps), "sums": np.concatenate(sums),
        "widths": np.array([product.width for product in products], np.int64), "bias": np.concatenate(biases),
    }  # fmt: skip
    if not any(product.bias for product in products):
        del arrays["bias"]
    return [onnx.numpy_helper.from_array(array, f"{source}.{part}") for part, array in arrays.items()]


def _of_integers(near: Neighbours, node) -> Product | None:
    """As `lower` writes it: DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul by the product of the scales."""
    rounded, cast = near.makers.get(node.input[0]), near.below(node.output[0], "Cast")
    rescaled = None if cast is None else near.below(cast.output[0], "Mul")
    if rounded is None or rounded.op_type != "DynamicQuantizeLinear" or rescaled is None:
        return None
    step = near.makers.get(_other(rescaled, cast.output[0]))
    if step is None or step.op_type != "Mul" or step.input[0] != rounded.output[1]:
        return None
    return _product(near, rounded, node.input[1], step.input[1], node, rescaled)


def _of_floats(near: Neighbours, node) -> Product | None:
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
    return _product(near, node, *weights.input[:2], node, node)


def _product(near: Neighbours, reader, weights: str, scales: str, first, last) -> Product | None:
    import onnx

    values, steps = near.constants.get(weights), near.constants.get(scales)
    if values is None or steps is None or values.data_type != onnx.TensorProto.INT8 or len(values.dims) != 2:
        return None
    inputs, outputs = values.dims
    if inputs > MOST_INPUTS or not _is_vector(steps, outputs) and list(steps.dims) not in ([], [1]):
        return None
    added, bias = near.below(last.output[0], "Add"), None
    if added is not None:
        other = _other(added, last.output[0])
        if _is_vector(near.constants.get(other), outputs):
            last, bias = added, other
    return Product(reader.input[0], weights, scales, bias, outputs, reader, first, last)


def _is_vector(constant, size: int) -> bool:
    import onnx

    return constant is not None and constant.data_type == onnx.TensorProto.FLOAT and list(constant.dims) == [size]


def _layer(near: Neighbours, shapes, products: Sequence[Product], readers: int, sums: set[str]) -> Layer:
    """
    Args:
        readers: how many products there are of this input. sums: of two products, those that one of them has taken.
    """
    norm, last = _norm(near, shapes, products, readers), [product.last for product in products]
    names = tuple(node.output[0] for node in last)
    gate = _gate(near, names) if len(products) == 2 and products[0].width == products[1].width else None
    if gate is not None:
        first, end = gate
        ordered = tuple(products if first == names[0] else reversed(products))
        return Layer(ordered, norm, Finish.GATED, None, (end.output[0],), products[0].first, (*last, end))
    if len(products) == 1:
        gelu, added = near.below(names[0], "Gelu"), near.below(names[0], "Add")
        if gelu is not None:
            told = next((attribute.s for attribute in gelu.attribute if attribute.name == "approximate"), b"none")
            finish = Finish.GELU_TANH if told == b"tanh" else Finish.GELU_ERF
            return Layer(tuple(products), norm, finish, None, tuple(gelu.output), gelu, (*last, gelu))
        if added is not None:
            other = _other(added, names[0])
            whole = other and shapes.get(other) == shapes.get(names[0]) is not None
            if whole and added.output[0] not in sums:
                sums.add(added.output[0])
                return Layer(tuple(products), norm, Finish.ADDED, other, tuple(added.output), added, (*last, added))
    return Layer(tuple(products), norm, Finish.PLAIN, None, names, products[0].first, tuple(last))


def _gate(near: Neighbours, names: Sequence[str]):
    """(a, the last node) of a sigmoid(a) b, of which the two are `names`."""
    for a, b in (names, names[::-1]):
        for last in near.readers(b):
            silu = None if last is None or last.op_type != "Mul" else near.makers.get(_other(last, b))
            if silu is None or silu.op_type != "Mul" or a not in silu.input:
                continue
            sigmoid = near.makers.get(_other(silu, a))
            if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.input[0] != a:
                continue
            if len(near.readers(a)) == 2 and all(len(near.readers(t)) == 1 for t in (b, *silu.output, *sigmoid.output)):
                return a, last
    return None


def _other(node, name: str) -> str:
    return next((other for other in node.input if other != name), "")


def _norm(near: Neighbours, shapes, products: Sequence[Product], readers: int) -> Norm | None:
    """The norm whose output all of these read, and nobody else."""
    import onnx

    x, node = products[0].x, near.makers.get(products[0].x)
    sources = {id(product.reader) for product in products}
    if node is None or readers != len(products) or any(id(reader) not in sources for reader in near.readers(x)):
        return None
    width = shapes.get(x, (0,))[-1]
    if node.op_type == "LayerNormalization":
        told = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        given = len(node.input) == 3 and all(_is_vector(near.constants.get(name), width) for name in node.input[1:])
        if not given or told.get("axis", -1) not in (-1, len(shapes[x]) - 1) or len(node.output) > 1:
            return None
        return Norm(*node.input, told.get("epsilon", 1e-5))
    if node.op_type != "Mul":
        return None
    weight = next((name for name in node.input if _is_vector(near.constants.get(name), width)), None)
    # x / sqrt(mean(x^2) + epsilon)
    divided = near.maker(_other(node, weight), "Div") if weight else None
    root = near.maker(divided.input[1], "Sqrt") if divided is not None else None
    moved = near.maker(root.input[0], "Add") if root is not None else None
    mean = near.maker(moved.input[0], "ReduceMean") if moved is not None else None
    power = near.maker(mean.input[0], "Pow") if mean is not None else None
    if power is None or power.input[0] != divided.input[0]:
        return None
    numbers = (power.input[1], moved.input[1], mean.input[1])
    exponent, epsilon, axes = (_scalar(near.constants.get(name)) for name in numbers)
    rank = len(shapes.get(power.input[0], ()))
    if exponent != 2 or epsilon is None or axes not in (-1, rank - 1):
        return None
    return Norm(power.input[0], weight, None, epsilon)


def _scalar(constant) -> float | None:
    import onnx

    array = None if constant is None else onnx.numpy_helper.to_array(constant)
    return float(array.reshape(())) if array is not None and array.size == 1 else None
