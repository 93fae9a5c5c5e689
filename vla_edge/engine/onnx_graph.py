"""What several readers and writers of stage files ask of an ONNX graph; nothing here imports onnx."""

from __future__ import annotations

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
