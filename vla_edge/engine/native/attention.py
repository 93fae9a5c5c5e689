"""Attention by the kernel: which nodes of a stage file are one, and the operator in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vla_edge.engine.native import DOMAIN
from vla_edge.engine.onnx_graph import Neighbours, tensor_shapes

OPERATOR = "Attention"
# of attention.h
MOST_TOKENS, MOST_DEPTH = 8192, 256
# Of fewer rows, rounding keys and values costs more than is won on the products.
FEWEST_ROWS = 8
# (rows, heads) and (heads, rows) change places
_SWAP = [0, 2, 1, 3]


@dataclass(frozen=True)
class Found:
    """The nodes of one attention: softmax(scale q k' + mask) v.

    Attributes:
        first, second: its products. mask: what is added to the scores, or None.
    """

    first: object
    second: object
    scale: float = 1.0
    mask: str | None = None


@dataclass(frozen=True)
class Earlier:
    """Keys and values of a cache, which come before those of an attention's own tokens.

    Attributes:
        stacks: the tensors that hold the cache's keys, and its values, of all layers. layer: the place there. k, v: own.
    """

    stacks: tuple[str, str]
    layer: int
    k: str
    v: str


def is_over_tokens(node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether it is a softmax over the last axis."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
    return node.op_type == "Softmax" and axis in (-1, len(shapes.get(node.input[0], ())) - 1)


def operations(node, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Those of both products of the operator."""
    told = next(attribute.i for attribute in node.attribute if attribute.name == "rows_first")
    q, k, v = (shapes[name] for name in node.input[:3])
    tokens = (k[1] if told & 2 else k[-2]) + (shapes[node.input[4]][-2] if len(node.input) > 4 else 0)
    return 2.0 * math.prod(q[:-1]) * tokens * (q[-1] + v[-1])


class Attentions:
    """Every attention of a graph (`onnx.GraphProto` with inferred shapes) that the kernel can compute, in `found`."""

    def __init__(self, graph):
        self._graph, self._shapes = graph, tensor_shapes(graph)
        self._near = Neighbours(graph)
        softmaxes = [node for node in graph.node if is_over_tokens(node, self._shapes)]
        self.found = [found for found in map(self._around, softmaxes) if found is not None]

    def replaced(self) -> list:
        """The graph's nodes with the operator in the place of each; what nobody reads any more is among them."""
        instead: dict[str, list] = {}
        for found in self.found:
            instead |= self._operator(found)
        return [new for node in self._graph.node for new in instead.get(node.output[0], [node])]

    def _around(self, softmax) -> Found | None:
        import onnx

        name, mask, scale = softmax.input[0], None, 1.0
        added = self._near.above(name, "Add")
        if added is not None:
            # scores are made for this sum alone
            own = 0 if self._near.above(added.input[0], "Reshape", "Mul", "MatMul") else 1
            mask, name = added.input[1 - own], added.input[own]
        split = self._near.above(name, "Reshape")
        name = name if split is None else split.input[0]
        scaled = self._near.above(name, "Mul")
        if scaled is not None and scaled.input[1] in self._near.constants and not self._shapes[scaled.input[1]]:
            scale = float(onnx.numpy_helper.to_array(self._near.constants[scaled.input[1]]))
            name = scaled.input[0]
        first = self._near.above(name, "MatMul")
        weights = softmax.output[0]
        joined = self._near.below(weights, "Reshape")
        weights = weights if joined is None else joined.output[0]
        second = self._near.below(weights, "MatMul")
        if first is None or second is None or second.input[0] != weights or (split is None) != (joined is None):
            return None
        found = Found(first, second, scale, mask)
        return found if self._fits(found, softmax, weights) else None

    def _fits(self, found: Found, softmax, weights: str) -> bool:
        shapes = self._shapes
        q, k, v = (shapes.get(name, ()) for name in (*found.first.input, found.second.input[1]))
        scores, seen = shapes.get(found.first.output[0], ()), shapes.get(softmax.output[0], ())
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

    def _operator(self, found: Found) -> dict[str, list]:
        """First output of nodes that go -> those that come in their place."""
        import onnx

        def swapped(order: list[int] | None, name: str) -> bool:
            return order == _SWAP and self._shapes[name][0] == 1

        (q, k), v, y = found.first.input, found.second.input[1], found.second.output[0]
        made, rows_first = [], 0
        order = self._near.order(k)
        source = k if order is None else self._near.makers[k].input[0]
        order = order or list(range(len(self._shapes[k])))
        order = [*order[:-2], order[-1], order[-2]]
        if swapped(order, k):
            k, rows_first = source, rows_first | 2
        elif order == sorted(order):
            k = source
        else:
            k = f"{y}.keys"
            made.append(onnx.helper.make_node("Transpose", [source], [k], k, perm=order))
        earlier = None if rows_first else self._earlier(k, v)
        if earlier is not None:
            k, v = earlier.k, earlier.v
            if swapped(self._near.order(k), k):
                k, rows_first = self._near.makers[k].input[0], rows_first | 2
        if swapped(self._near.order(q), q):
            q, rows_first = self._near.makers[q].input[0], rows_first | 1
        if swapped(self._near.order(v), v):
            v, rows_first = self._near.makers[v].input[0], rows_first | 4
        gone = {y: made}
        after = self._near.below(y, "Transpose")
        if after is not None and swapped(self._near.order(after.output[0]), y):
            y, rows_first = after.output[0], rows_first | 8
            gone[y] = []
        operands, layer = [q, k, v] + ([found.mask] if found.mask else []), {}
        if earlier is not None:
            operands, layer = [q, k, v, found.mask or "", *earlier.stacks], {"layer": earlier.layer}
        made.append(onnx.helper.make_node(
            OPERATOR, operands, [y], found.second.name, domain=DOMAIN, scale=found.scale, rows_first=rows_first, **layer,
        ))  # fmt: skip
        return gone

    def _earlier(self, k: str, v: str) -> Earlier | None:
        """What keys and values, heads first, are joined from."""
        joined = [self._near.maker(name, "Concat") for name in (k, v)]
        for name, one in zip((k, v), joined):
            rank = len(self._shapes[name])
            if one is None or len(one.input) != 2 or one.attribute[0].i % rank != rank - 2:
                return None
        first, own = zip(*(one.input for one in joined))
        before = [self._shapes.get(name, ()) for name in first]
        if not all(before) or before[0][-2] != before[1][-2]:
            return None
        (k_stack, layer), (v_stack, same) = map(self._near.stacked, first)
        return Earlier((k_stack, v_stack), layer, *own) if layer == same else None
