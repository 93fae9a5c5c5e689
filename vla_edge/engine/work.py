"""What one call of a stage has to do, read from its file: products, and bytes that have to come from memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vla_edge.engine.native import attention, cached_attention, int4_products, int8_products
from vla_edge.engine.onnx_graph import shape_of, tensor_shapes

OF_INTEGERS = ("MatMulInteger", int4_products.OPERATOR, int8_products.OPERATOR)
ATTENTIONS = {own.OPERATOR: own for own in (attention, cached_attention)}
PRODUCTS = ("MatMul", "Gemm", "Conv", *OF_INTEGERS, *ATTENTIONS)
# how the names of keys and values begin that a stage reads: a flow policy's, a prompt's, and those of tokens behind it
CACHES = ("prefix_", "cache_", "tail_")


@dataclass(frozen=True)
class Work:
    """Of one call.

    Attributes:
        flops: precision of the products ("float32", "int8") -> operations of layers; a product and its sum are two.
        attention_flops: of products of two computed tensors.
        weight_bytes: of all constants, as stored. cache_bytes: of inputs that are keys and values.
        other_bytes: of the other inputs, and of outputs.
    """

    flops: Mapping[str, float]
    attention_flops: float
    weight_bytes: int
    cache_bytes: int
    other_bytes: int

    @property
    def all_flops(self) -> float:
        return sum(self.flops.values()) + self.attention_flops

    @property
    def all_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.other_bytes


def stage_work(path: str | Path) -> Work | None:
    """Of a stage file; None for a compiled plan, which tells nothing of it.

    Raises:
        ImportError: onnx is not installed.
    """
    import onnx

    path = Path(path)
    if path.suffix != ".onnx":
        return None
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = model.graph
    constants, shapes = {constant.name: constant for constant in graph.initializer}, tensor_shapes(graph)
    makers = {output: node for node in graph.node for output in node.output}

    def constant_like(name: str) -> bool:
        return name in constants or (name in makers and all(constant_like(i) for i in makers[name].input if i))

    def rounded(name: str) -> bool:
        node = makers.get(name)
        return node is not None and node.op_type == "DequantizeLinear"

    flops: dict[str, float] = {}
    attention_flops = 0.0
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        left, out = shapes.get(node.input[0]), shapes.get(node.output[0])
        if not left or not out:
            continue
        inner = math.prod(shapes.get(node.input[1], ())[1:]) if node.op_type == "Conv" else left[-1]
        operations = 2.0 * math.prod(out) * inner
        if node.op_type == int8_products.OPERATOR:  # may be several layers
            operations = 2.0 * math.prod(left) * int8_products.outputs_of(node, constants)
        if node.op_type in ATTENTIONS:
            attention_flops += ATTENTIONS[node.op_type].operations(node, shapes)
            continue
        if not constant_like(node.input[1]):
            attention_flops += operations
            continue
        both = rounded(node.input[0]) and rounded(node.input[1])
        kind = "int8" if node.op_type in OF_INTEGERS or both else "float32"
        flops[kind] = flops.get(kind, 0.0) + operations
    cache = [value for value in graph.input if value.name.startswith(CACHES)]
    rest = [value for value in graph.input if not value.name.startswith(CACHES)]
    return Work(
        flops,
        attention_flops,
        sum(_bytes(c.dims, c.data_type) for c in graph.initializer),
        sum(_bytes(shape_of(v), v.type.tensor_type.elem_type) for v in cache),
        sum(_bytes(shape_of(v), v.type.tensor_type.elem_type) for v in (*rest, *graph.output)),
    )


def _bytes(shape, kind: int) -> int:
    import onnx

    bits = 4 if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1) else None
    size = math.prod(shape)
    return -(-size // 2) if bits else size * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
