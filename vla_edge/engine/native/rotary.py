"""Rotary embeddings of a stage file: which nodes are one, and the operator in their place.

As exporters write it, it is eight nodes, each of which reads and writes what the one before has made.
"""

from __future__ import annotations

from dataclasses import dataclass

from vla_edge.engine.native import DOMAIN
from vla_edge.engine.onnx_graph import Neighbours, tensor_shapes

OPERATOR = "Rotary"


@dataclass(frozen=True)
class Found:
    """The nodes of one: (a cos - b sin, b cos + a sin) of the halves a, b of x.

    Attributes:
        x: (1, heads, rows, depth), or (1, rows, heads, depth) where `rows_first`. last: the node that joins the halves.
    """

    x: str
    cos: str
    sin: str
    rows_first: bool
    last: object


def takes(graph) -> list[Found]:
    """The rotary embeddings of a graph (`onnx.GraphProto` with inferred shapes)."""
    near, shapes = Neighbours(graph), tensor_shapes(graph)
    found = [_around(near, shapes, node) for node in graph.node if node.op_type == "Concat"]
    return [rotary for rotary in found if rotary is not None]


def replace(graph) -> None:
    """Have the operator in the place of each; what nobody reads any more stays."""
    import onnx

    for found in takes(graph):
        found.last.CopyFrom(onnx.helper.make_node(
            OPERATOR, [found.x, found.cos, found.sin], list(found.last.output), found.last.name,
            domain=DOMAIN, rows_first=int(found.rows_first),
        ))  # fmt: skip


def _around(near: Neighbours, shapes, concat) -> Found | None:
    if len(concat.input) != 2:
        return None
    turned, other = (near.above(name, kind) for name, kind in zip(concat.input, ("Sub", "Add")))
    if turned is None or other is None:
        return None
    # (first factor, second factor) of a cos, b sin, b cos, a sin
    factors = [near.above(name, "Mul") for name in (*turned.input, *other.input)]
    if any(node is None for node in factors):
        return None
    (a, cos), (b, sin), *rest = (tuple(node.input) for node in factors)
    split = near.makers.get(a)
    if rest != [(b, cos), (a, sin)] or split is None or split.op_type != "Split" or list(split.output) != [a, b]:
        return None
    x, rows_first = split.input[0], False
    shape, angles = shapes.get(x, ()), {shapes.get(name, ()) for name in (cos, sin)}
    if len(shape) != 4 or shape[0] != 1 or shape[-1] % 2 or shapes.get(concat.output[0]) != shape:
        return None
    if shapes.get(a) != (*shape[:-1], shape[-1] // 2) or angles != {(1, 1, shape[2], shape[3] // 2)}:
        return None
    if near.order(x) == [0, 2, 1, 3]:
        x, rows_first = near.makers[x].input[0], True
    return Found(x, cos, sin, rows_first, concat)
