"""Attention by the kernel: which nodes of a stage file are one, and the operator in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vla_edge.engine.native import DOMAIN

OPERATOR = "Attention"
# of attention.h
MOST_TOKENS, MOST_DEPTH = 8192, 256
# Of fewer rows, rounding keys and values costs more than is won on the products.
FEWEST_ROWS = 8
# (rows, heads) and (heads, rows) change places
_SWAP = [0, 2, 1, 3]


@dataclass
class Found:
    """The nodes of one attention, from the first product to the second.

    Attributes:
        nodes: all of them, in order. shapes: of every tensor of the graph.
        scale: of the products. mask: what is added to them, or None.
    """

    nodes: list
    shapes: Mapping[str, tuple[int, ...]]
    scale: float = 1.0
    mask: str | None = None

    @property
    def q(self) -> str:
        return self.nodes[0].input[0]

    @property
    def transposed_k(self) -> str:
        return self.nodes[0].input[1]

    @property
    def v(self) -> str:
        return self.nodes[-1].input[1]


def find(graph) -> list[Found]:
    """Every attention of a graph (`onnx.GraphProto` with inferred shapes) that the kernel can compute."""
    import onnx

    shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    constants = {constant.name: constant for constant in graph.initializer}
    shapes |= {name: tuple(constant.dims) for name, constant in constants.items()}
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list] = {value.name: [None] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def above(name: str, kind: str):
        """The node of that kind that made a tensor for this reader alone."""
        node = makers.get(name)
        return node if node is not None and node.op_type == kind and len(readers[name]) == 1 else None

    def below(name: str, kind: str):
        only = readers.get(name, [])
        return only[0] if len(only) == 1 and only[0] is not None and only[0].op_type == kind else None

    def attention(softmax) -> Found | None:
        found, name = Found([softmax], shapes), softmax.input[0]
        added = above(name, "Add")
        if added is not None:
            # scores are of several heads, or made for this sum alone
            own = 0 if any(above(added.input[0], kind) for kind in ("Reshape", "Mul", "MatMul")) else 1
            found.mask, name = added.input[1 - own], added.input[own]
            found.nodes.insert(0, added)
        split = above(name, "Reshape")
        if split is not None:
            found.nodes.insert(0, split)
            name = split.input[0]
        scaled = above(name, "Mul")
        if scaled is not None and scaled.input[1] in constants and not shapes[scaled.input[1]]:
            found.scale = float(onnx.numpy_helper.to_array(constants[scaled.input[1]]))
            found.nodes.insert(0, scaled)
            name = scaled.input[0]
        first = above(name, "MatMul")
        name = softmax.output[0]
        joined = below(name, "Reshape")
        if joined is not None:
            found.nodes.append(joined)
            name = joined.output[0]
        second = below(name, "MatMul")
        if first is None or second is None or second.input[0] != name or (split is None) != (joined is None):
            return None
        found.nodes = [first, *found.nodes, second]
        return found if _fits(found, softmax, name) else None

    softmaxes = [node for node in graph.node if node.op_type == "Softmax" and _axis(node) in (-1, 3)]
    return [found for found in map(attention, softmaxes) if found is not None]


def replace(graph) -> None:
    """Put the operator in the place of every attention found; what nobody reads any more stays in the graph."""
    instead: dict[str, list] = {}
    for found in find(graph):
        instead |= _operator(graph, found)
    nodes = [new for node in graph.node for new in instead.get(node.output[0], [node])]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _operator(graph, found: Found) -> dict[str, list]:
    """First output of nodes that go -> those that come in their place."""
    import onnx

    makers = {output: node for node in graph.node for output in node.output}
    shapes, made, rows_first = found.shapes, [], 0

    def perm(name: str) -> list[int] | None:
        node = makers.get(name)
        if node is None or node.op_type != "Transpose":
            return None
        return list(next(attribute.ints for attribute in node.attribute if attribute.name == "perm"))

    def swapped(order: list[int] | None, name: str) -> bool:
        return order == _SWAP and shapes[name][0] == 1

    q, k, v, y = found.q, found.transposed_k, found.v, found.nodes[-1].output[0]
    order = perm(k)
    source = k if order is None else makers[k].input[0]
    order = order or list(range(len(shapes[k])))
    order = [*order[:-2], order[-1], order[-2]]
    if swapped(order, k):
        k, rows_first = source, rows_first | 2
    elif order == sorted(order):
        k = source
    else:
        k = f"{y}.keys"
        made.append(onnx.helper.make_node("Transpose", [source], [k], k, perm=order))
    if swapped(perm(q), q):
        q, rows_first = makers[q].input[0], rows_first | 1
    if swapped(perm(v), v):
        v, rows_first = makers[v].input[0], rows_first | 4
    gone = {y: made}
    after = [node for node in graph.node if y in node.input]
    kept = y in {value.name for value in graph.output} or len(after) != 1
    if not kept and swapped(perm(after[0].output[0]), y):
        y, rows_first = after[0].output[0], rows_first | 8
        gone[y] = []
    operands = [q, k, v] + ([found.mask] if found.mask else [])
    made.append(onnx.helper.make_node(
        OPERATOR, operands, [y], found.nodes[-1].name, domain=DOMAIN, scale=found.scale, rows_first=rows_first,
    ))  # fmt: skip
    return gone


def _fits(found: Found, softmax, weights: str) -> bool:
    shapes = found.shapes
    q, k, v = (shapes.get(name, ()) for name in (found.q, found.transposed_k, found.v))
    scores, seen = shapes.get(found.nodes[0].output[0], ()), shapes.get(softmax.output[0], ())
    if not all((q, k, v, scores, seen)) or not len(q) == len(k) == len(v) == len(scores) or len(q) < 2:
        return False
    if q[:-2] != k[:-2] or q[:-2] != v[:-2] or shapes.get(weights) != scores or seen[-1] != scores[-1]:
        return False
    if found.mask is not None:
        mask = shapes.get(found.mask, ())
        if len(mask) < 2 or any(size != 1 for size in mask[:-2]):
            return False
        if mask[-1] != seen[-1] or mask[-2] not in (1, seen[-2]):
            return False
    if scores[-2] % seen[-2]:
        return False
    rows, depth, tokens = q[-2], q[-1], v[-2]
    return rows >= FEWEST_ROWS and depth % 2 == 0 and depth <= MOST_DEPTH and tokens <= MOST_TOKENS


def _axis(node) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)


def _shape(value) -> tuple[int, ...]:
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
