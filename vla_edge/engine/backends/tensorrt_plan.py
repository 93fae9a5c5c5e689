"""A stage file -> what TensorRT can build for a generation of GPUs, or why it cannot.

The network is strongly typed: precision is what the file says and nothing else. Tensor cores differ by compute
capability: 8-bit floats from 8.9 on, 4-bit floats from 10.0 on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_edge.engine.backends import BackendError, one_line

FP8_FROM, FP4_FROM = 89, 100


def read(path: str | Path):
    """The file as an `onnx.ModelProto` that suits TensorRT: inputs rounded to signed integers around zero.

    A grid of unsigned integers is replaced by the signed one that reaches as far to both sides; up to one bit coarser.

    Raises:
        BackendError: it cannot be read.
    """
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise BackendError(f"stage file {path} cannot be read: {one_line(error)}") from error
    constants = {constant.name: constant for constant in model.graph.initializer}
    seen = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        scale, zero = (constants.get(name) for name in node.input[1:3])
        if scale is None or zero is None or zero.data_type != onnx.TensorProto.UINT8 or zero.name in seen:
            continue
        seen.add(zero.name)
        point = onnx.numpy_helper.to_array(zero).astype(np.float32)
        step = onnx.numpy_helper.to_array(scale) * (np.maximum(point, 255 - point) / 127)
        scale.CopyFrom(onnx.numpy_helper.from_array(step.astype(np.float32), scale.name))
        zero.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(point, np.int8), zero.name))
    return model


def refusals(model, capability: int) -> list[str]:
    """Why TensorRT will not build `model` for `capability` (87 for Orin's 8.7); empty when nothing is known."""
    import onnx

    kinds = onnx.TensorProto
    reasons = []
    stored = {constant.name: constant for constant in model.graph.initializer}
    types = {constant.data_type for constant in stored.values()}
    if kinds.FLOAT8E4M3FN in types and capability < FP8_FROM:
        reasons.append(f"8-bit floating point needs compute capability 8.9, this is {capability / 10:.1f}: use int8")
    if kinds.FLOAT4E2M1 in types and capability < FP4_FROM:
        reasons.append(f"4-bit floating point needs compute capability 10.0, this is {capability / 10:.1f}: use int4")
    if types & {kinds.UINT4, kinds.UINT8}:
        reasons.append("constants of unsigned integers are not taken: use signed ones around zero")
    operators = {node.op_type for node in model.graph.node}
    if operators & {"DynamicQuantizeLinear", "MatMulInteger"}:
        reasons.append("inputs rounded with steps found at run time are not taken: use activations: int8 with ranges")
    if foreign := {node.domain for node in model.graph.node} - {"", "ai.onnx"}:
        reasons.append(f"operators of {', '.join(sorted(foreign))} are not taken: export standard ONNX")
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and node.input[1] in stored:
            steps = onnx.numpy_helper.to_array(stored[node.input[1]]).astype(np.float32)
            if stored[node.input[0]].data_type == kinds.INT8 and (steps <= 0).any():
                reasons.append(
                    f"{node.input[1]} holds scales that are not positive: turn them and their weights around"
                )
    for name, constant in stored.items():
        if constant.data_type in (kinds.INT4, kinds.FLOAT4E2M1) and int(np.prod(constant.dims)) % 2:
            reasons.append(f"{name} holds an odd number of 4-bit values: keep that layer in another precision")
    return reasons


def two_to_four(model) -> bool:
    """Whether every large weight has two zeros in each four along its inputs, which sparse tensor cores skip."""
    import onnx

    found = False
    for constant in model.graph.initializer:
        if len(constant.dims) != 2 or constant.dims[0] % 4 or constant.data_type in (onnx.TensorProto.INT4,):
            continue
        if int(np.prod(constant.dims)) < 4096:
            continue
        values = onnx.numpy_helper.to_array(constant).astype(np.float32)
        if (np.count_nonzero(values.reshape(-1, 4, values.shape[1]), axis=1) > 2).any():
            return False
        found = True
    return found
