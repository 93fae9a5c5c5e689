"""Attention to a cache and to what is behind it, of few rows: which nodes of a stage file are one, and the operator in
their place.

A stage reads the keys and values of all its layers in one tensor, of which the runtime copies out each layer's: as many
bytes again as the weights are read in 4 bits. The operator reads them where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vla_edge.engine.native import DOMAIN
from vla_edge.engine.native.attention import is_over_tokens
from vla_edge.engine.onnx_graph import Neighbours, tensor_shapes

OPERATOR = "CachedAttention"
# of cached_attention.h; and of more rows that share keys, the runtime's product is worth the copy
LANES, MOST_ROWS = 16, 64


@dataclass(frozen=True)
class Found:
    """The nodes of one: softmax(scale q [k, own_k]' + [bias, own_bias]) [v, own_v], see `policy.blocks.attend_cached`.

    Attributes:
        inputs: of the operator. layer: the place in `k` and `v`. last: the node that puts heads behind rows.
    """

    inputs: tuple[str, ...]
    scale: float
    layer: int
    last: object


def takes(graph) -> list[Found]:
    """Those of a graph (`onnx.GraphProto` with inferred shapes)."""
    reader = _Reader(graph)
    found = [reader.around(node) for node in graph.node if is_over_tokens(node, reader.shapes)]
    return [attention for attention in found if attention is not None]


def replace(graph) -> None:
    """Have the operator in the place of each; what nobody reads any more stays."""
    import onnx

    for found in takes(graph):
        found.last.CopyFrom(onnx.helper.make_node(
            OPERATOR, list(found.inputs), list(found.last.output), found.last.name,
            domain=DOMAIN, scale=found.scale, layer=found.layer,
        ))  # fmt: skip


def operations(node, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Those of both products of the operator."""
    q, k, own_k = (shapes[node.input[place]] for place in (0, 1, 4))
    return 4.0 * math.prod(q) * (k[-2] + own_k[-2])


class _Reader:
    """The nodes of `attend_cached`, as exporters write it."""

    def __init__(self, graph):
        self._near, self.shapes = Neighbours(graph), tensor_shapes(graph)

    def around(self, softmax) -> Found | None:
        """The attention whose weights a node makes."""
        near, shapes = self._near, self.shapes
        joined = near.above(softmax.input[0], "Concat")
        if joined is None or len(joined.input) != 2:
            return None
        cached, own = (self._scores(name) for name in joined.input)
        parts = [self._mixed(reader) for reader in near.readers(softmax.output[0])]
        if cached is None or own is None or len(parts) != 2 or None in parts:
            return None
        (q, k, bias), (same, own_k, own_bias) = cached, own
        # of the two slices of the weights the cache's begins at the first
        (begin, ours, v, added), (after, theirs, own_v, other) = sorted(parts, key=lambda part: part[0] != 0)
        scaled = near.maker(q, "Mul")
        if begin != 0 or after not in (ours, -theirs) or same != q or added is not other or scaled is None:
            return None
        last = self._swapped(added.output[0])
        q, scale = self._through(scaled.input[0]), self._near.number(scaled.input[1])
        if last is None or scale is None or any(len(shapes.get(name, ())) != 4 for name in (q, k, v, own_k, own_v)):
            return None
        (_, all_heads, rows, depth), (_, heads, tokens, _) = shapes[q], shapes[k]
        behind = shapes[own_k][2]
        fits = (
            depth % LANES == 0 and all_heads % heads == 0 and all_heads // heads * rows <= MOST_ROWS
            and shapes[k] == shapes[v] == (1, heads, tokens, depth)
            and shapes[own_k] == shapes[own_v] == (1, heads, behind, depth)
            and (ours, theirs) == (tokens, behind)
            and _size(shapes.get(bias)) == tokens and _size(shapes.get(own_bias)) == rows * behind
            and shapes.get(last.output[0]) == (1, rows, all_heads, depth)
        )  # fmt: skip
        (k, layer), (v, same) = self._near.stacked(k), self._near.stacked(v)
        return Found((q, k, v, bias, own_k, own_v, own_bias), scale, layer, last) if fits and layer == same else None

    def _scores(self, name: str) -> tuple[str, str, str] | None:
        """q, k and what is added, of q k' + something."""
        added = self._near.above(self._through(name), "Add")
        if added is None:
            return None
        for own in (0, 1):
            product = self._near.above(self._through(added.input[own]), "MatMul")
            if product is not None and self._near.order(product.input[1]) == [0, 1, 3, 2]:
                return product.input[0], self._near.makers[product.input[1]].input[0], added.input[1 - own]
        return None

    def _mixed(self, part) -> tuple[int, int, str, object] | None:
        """Where a slice of the weights begins, for how many tokens it is, their values, and the sum that this is a part
        of."""
        begin = self._near.number(part.input[1]) if part is not None and part.op_type == "Slice" else None
        product = None if begin is None else self._near.below(part.output[0], "MatMul")
        added = None if product is None else self._near.below(product.output[0], "Add")
        tokens = self.shapes.get(part.output[0], (0,))[-1]
        return None if added is None else (int(begin), tokens, product.input[1], added)

    def _swapped(self, name: str):
        """The node that has heads and rows change places, whatever shape there is between."""
        shaped = self._near.below(name, "Reshape")
        last = self._near.below(name if shaped is None else shaped.output[0], "Transpose")
        return last if last is not None and self._near.order(last.output[0]) == [0, 2, 1, 3] else None

    def _through(self, name: str) -> str:
        """What a tensor was before it got another shape."""
        shaped = self._near.above(name, "Reshape")
        return name if shaped is None else shaped.input[0]


def _size(shape) -> int:
    """Numbers of a tensor of that shape; 0 where it is not known."""
    return 0 if shape is None else math.prod(shape)
