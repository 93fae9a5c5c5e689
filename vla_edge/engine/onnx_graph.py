"""What several readers and writers of stage files ask of an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Iterable


def shape_of(value) -> tuple[int, ...]:
    """Of an `onnx.ValueInfoProto`, whose sizes are all known."""
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)


def tensor_shapes(graph) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a graph (`onnx.GraphProto` with inferred shapes), constants too."""
    values = (*graph.value_info, *graph.input, *graph.output)
    constants = {constant.name: tuple(constant.dims) for constant in graph.initializer}
    return {value.name: shape_of(value) for value in values} | constants


def needed(nodes: Iterable, outputs: Iterable[str]) -> tuple[list, set[str]]:
    """The nodes that `outputs` depend on, in order, and the names of all that is read."""
    kept, outputs = list(nodes), set(outputs)
    while True:
        read = {operand for node in kept for operand in node.input} | outputs
        still = [node for node in kept if read.intersection(node.output)]
        if len(still) == len(kept):
            return kept, read
        kept = still


def set_nodes(graph, nodes: Iterable) -> None:
    """Have a graph (`onnx.GraphProto`) consist of these nodes, of which some are its own."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]  # its own go when it is emptied
    del graph.node[:]
    graph.node.extend(copies)


class Neighbours:
    """Which node made a tensor of a graph (`onnx.GraphProto`), and which ones read it.

    Attributes:
        constants: name -> `onnx.TensorProto`. makers: name -> node.
    """

    def __init__(self, graph):
        self.constants = {constant.name: constant for constant in graph.initializer}
        self.makers = {output: node for node in graph.node for output in node.output}
        # a name that is an output of the graph has None among its readers
        self._readers: dict[str, list] = {value.name: [None] for value in graph.output}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def readers(self, name: str) -> list:
        """The nodes that read a tensor; None among them where it is an output of the graph."""
        return self._readers.get(name, [])

    def maker(self, name: str, kind: str):
        """The node of that kind that made a tensor."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def order(self, name: str) -> list[int] | None:
        """The order of axes in which a tensor is another one's; None where it is no transposition."""
        node = self.maker(name, "Transpose")
        return None if node is None else list(next(a.ints for a in node.attribute if a.name == "perm"))

    def above(self, name: str, *kinds: str):
        """The node of one of these kinds that made a tensor for one reader alone."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in kinds and len(self._readers[name]) == 1 else None

    def below(self, name: str, kind: str):
        """The node of that kind that alone reads a tensor."""
        only = self._readers.get(name, [])
        return only[0] if len(only) == 1 and only[0] is not None and only[0].op_type == kind else None

    def stacked(self, name: str) -> tuple[str, int]:
        """The tensor whose first axis this is one place of, such as of all layers, and the place; itself and 0 where it is
        none."""
        one = self.maker(name, "Gather")
        first = one is not None and not any(attribute.name == "axis" and attribute.i for attribute in one.attribute)
        place = self.number(one.input[1]) if first else None
        return (name, 0) if place is None or place < 0 else (one.input[0], int(place))

    def number(self, name: str) -> float | None:
        """The value of a constant that is one number."""
        import onnx

        constant = self.constants.get(name)
        return None if constant is None or math.prod(constant.dims) != 1 else onnx.numpy_helper.to_array(constant).item()
