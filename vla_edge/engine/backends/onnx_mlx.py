"""A stage file as a function over MLX arrays: standard ONNX operators, weights of 8 and 4 bits kept packed.

What the file computes in float64 is computed in float32: Apple's GPUs have no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from vla_edge.engine.backends import BackendError, StageInterface
from vla_edge.engine.backends.onnx_program import ints, read_program

_DTYPES = {1: mx.float32, 2: mx.uint8, 3: mx.int8, 6: mx.int32, 7: mx.int64, 9: mx.bool_, 10: mx.float16}
_DTYPES |= {11: mx.float32, 16: mx.bfloat16}
# inputs that share a scale in the library's packed products
_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class _Packed:
    """A weight (inputs, outputs) as the library multiplies it: groups along the inputs, value = scale * word + bias."""

    words: mx.array
    scales: mx.array
    biases: mx.array
    group: int
    bits: int

    def unpacked(self) -> mx.array:
        return mx.dequantize(self.words, self.scales, self.biases, self.group, self.bits).T


def read_function(path: str | Path, stage: StageInterface) -> tuple[Callable, list[str]]:
    """The file as a function of MLX arrays, and the names of its inputs in order; it returns the stage's outputs.

    Raises:
        BackendError: the file cannot be read, has other tensors, or an operator that is not known here.
    """
    program = read_program(path, stage, OPERATORS, _array, "MLX")
    shapes = {spec.name: spec.shape for spec in stage.inputs}
    for name, found in program.inputs.items():
        if found != shapes[name]:
            raise BackendError(
                f"the file of stage {stage.name!r} takes {name} in the shape {found}, and its manifest says "
                f"{shapes[name]}; build the bundle again"
            )
    wanted = [spec.name for spec in stage.outputs]
    return lambda *arrays: program(dict(zip(program.inputs, arrays)), wanted), list(program.inputs)


def _array(value) -> mx.array:
    if isinstance(value, _Packed):
        return value.unpacked()
    if isinstance(value, (np.ndarray, np.generic)):
        return mx.array(value.astype(np.float32) if value.dtype == np.float64 else value)
    return value


def _cast(x, attributes):
    if isinstance(x[0], np.ndarray) and attributes["to"] == 1:
        return x[0].astype(np.float32)  # scales of packed weights are such
    return _array(x[0]).astype(_DTYPES[attributes["to"]])


def _concat(x, attributes):
    if all(isinstance(value, np.ndarray) for value in x):
        return np.concatenate(x, attributes["axis"])
    return mx.concatenate([_array(value) for value in x], attributes["axis"])


def _expand(x, attributes):
    array = _array(x[0])
    return mx.broadcast_to(array, np.broadcast_shapes(tuple(array.shape), tuple(ints(x[1]))))


def _gather(x, attributes):
    axis = attributes.get("axis", 0)
    if all(isinstance(value, np.ndarray) for value in x):
        return np.take(x[0], x[1], axis)
    return mx.take(_array(x[0]), _array(x[1]), axis)  # it counts negative indices from the end


def _reshape(x, attributes):
    array, shape = _array(x[0]), ints(x[1])
    if not attributes.get("allowzero"):
        shape = [array.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return array.reshape(shape)


def _slice(x, attributes):
    array = _array(x[0])
    starts, ends = ints(x[1]), ints(x[2])
    axes = ints(x[3]) if len(x) > 3 and x[3] is not None else range(len(starts))
    steps = ints(x[4]) if len(x) > 4 and x[4] is not None else [1] * len(starts)
    index = [slice(None)] * array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):
        length = array.shape[axis]
        index[axis] = slice(*slice(start, max(end, -length - 1) if step < 0 else end, step).indices(length))
        if step < 0:
            raise BackendError("MLX's reader of stage files does not know a Slice that runs backwards")
    return array[tuple(index)]


def _split(x, attributes):
    array, axis = _array(x[0]), attributes.get("axis", 0)
    if len(x) > 1 and x[1] is not None:
        places = np.cumsum(ints(x[1]))[:-1].tolist()
    else:
        size = -(-array.shape[axis] // attributes["num_outputs"])
        places = list(range(size, array.shape[axis], size))
    return tuple(mx.split(array, places, axis))


def _squeeze(x, attributes):
    return mx.squeeze(_array(x[0]), tuple(ints(x[1])) if len(x) > 1 else None)


def _reduce(function: Callable):
    def run(x, attributes):
        axes = ints(x[1]) if len(x) > 1 and x[1] is not None else None
        return function(_array(x[0]), axis=axes, keepdims=bool(attributes.get("keepdims", 1)))

    return run


def _cumsum(x, attributes):
    flags = {"reverse": bool(attributes.get("reverse")), "inclusive": not attributes.get("exclusive")}
    return mx.cumsum(_array(x[0]), axis=ints(x[1])[0], **flags)


def _gelu(x, attributes):
    array = _array(x[0])
    if attributes.get("approximate", b"none") == b"tanh":
        return 0.5 * array * (1 + mx.tanh(np.sqrt(2 / np.pi).item() * (array + 0.044715 * array * array * array)))
    return 0.5 * array * (1 + mx.erf(array / np.sqrt(2).item()))


def _layer_norm(x, attributes):
    array, axis = _array(x[0]), attributes.get("axis", -1)
    if axis % array.ndim != array.ndim - 1:
        raise BackendError("MLX's reader of stage files does not know a LayerNormalization of several axes")
    bias = _array(x[2]) if len(x) > 2 and x[2] is not None else None
    return mx.fast.layer_norm(array, _array(x[1]), bias, attributes.get("epsilon", 1e-5))


def _gemm(x, attributes):
    a, b = (_array(value) for value in x[:2])
    a, b = a.T if attributes.get("transA") else a, b.T if attributes.get("transB") else b
    product = attributes.get("alpha", 1.0) * (a @ b)
    return product + attributes.get("beta", 1.0) * _array(x[2]) if len(x) > 2 and x[2] is not None else product


def _matmul(x, attributes):
    left, right = x
    if not isinstance(right, _Packed):
        return _array(left) @ _array(right)
    return mx.quantized_matmul(
        _array(left), right.words, right.scales, right.biases, transpose=True, group_size=right.group, bits=right.bits
    )


def _per_channel(parameter, like, attributes: Mapping) -> mx.array:
    """Scales or zero points in a shape that multiplies `like`: of the whole, of channels, or of blocks of an axis."""
    parameter = _array(parameter)
    axis, block = attributes.get("axis", 1) % like.ndim, attributes.get("block_size", 0)
    if block:
        places = (slice(None),) * axis + (slice(like.shape[axis]),)
        return mx.repeat(parameter, block, axis)[places]
    return parameter if parameter.size == 1 else parameter.reshape([-1] + [1] * (like.ndim - axis - 1))


def _dequantize(x, attributes):
    zero = x[2] if len(x) > 2 else None
    if isinstance(x[0], np.ndarray):
        packed = _pack(x[0], x[1], zero, attributes)
        if packed is not None:
            return packed
    centred = _array(x[0]).astype(mx.float32)
    if zero is not None:
        centred = centred - _per_channel(zero, centred, attributes).astype(mx.float32)
    return centred * _per_channel(x[1], centred, attributes)


def _pack(values: np.ndarray, scale, zero, attributes: Mapping) -> _Packed | None:
    """A constant of signed integers around zero as a packed weight; None where the library has no product for it."""
    block, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    if values.ndim != 2 or values.dtype != np.int8 or not isinstance(scale, np.ndarray) or scale.dtype != np.float32:
        return None
    if (zero is not None and np.any(np.asarray(zero))) or (block and axis % 2 != 0):
        return None
    bits = 4 if block else 8  # in blocks are only those of 4 bits
    group = block or next((size for size in _GROUPS if values.shape[0] % size == 0), 0)
    if group not in _GROUPS or values.shape[0] % group or values.min() < -8 and bits == 4:
        return None
    if not block and scale.size > 1 and axis % 2 != 1:
        return None
    groups = scale if block else np.broadcast_to(scale.reshape(1, -1), (values.shape[0] // group, values.shape[1]))
    shift = 1 << (bits - 1)
    words = np.ascontiguousarray((values.T.astype(np.int16) + shift).astype(np.uint8))
    if bits == 4:
        words = words[:, 0::2] | words[:, 1::2] << 4
    scales = np.ascontiguousarray(groups.T)
    return _Packed(mx.array(words.view(np.uint32)), mx.array(scales), mx.array(-shift * scales), group, bits)


def _quantize(x, attributes):
    values = _array(x[0])
    scaled = mx.round(values / _per_channel(x[1], values, attributes))
    zero = x[2] if len(x) > 2 else None
    if zero is not None:
        if not (isinstance(zero, np.ndarray) and zero.dtype in (np.int8, np.uint8)):
            raise BackendError("MLX's reader of stage files rounds inputs to 8-bit integers only")
        low, high = (0, 255) if zero.dtype == np.uint8 else (-128, 127)
        return mx.clip(scaled + _per_channel(zero.astype(np.float32), values, attributes), low, high)
    if attributes.get("output_dtype") != 22:  # INT4
        raise BackendError("MLX's reader of stage files rounds inputs to integers only")
    return mx.clip(scaled, -8, 7)


def _dynamic_quantize(x, attributes):
    low, high = mx.minimum(mx.min(x[0]), 0.0), mx.maximum(mx.max(x[0]), 0.0)
    scale = (high - low) / 255
    scale = mx.where(scale == 0, mx.ones_like(scale), scale)
    zero = mx.clip(mx.round(-low / scale), 0, 255)
    return mx.clip(mx.round(x[0] / scale) + zero, 0, 255), scale, zero


def _matmul_integer(x, attributes):
    """In float32: whole numbers up to 16,777,216 are exact, larger sums are off by a 16-millionth."""
    a, b = (_array(value).astype(mx.float32) for value in x[:2])
    zeros = [0.0 if value is None else _array(value).astype(mx.float32) for value in (*x[2:], None, None)[:2]]
    return (a - zeros[0]) @ (b - zeros[1])


def _both(function: Callable):
    return lambda x, attributes: function(_array(x[0]), _array(x[1]))


def _one(function: Callable):
    return lambda x, attributes: function(_array(x[0]))


OPERATORS: dict[str, Callable] = {
    "Abs": _one(mx.abs),
    "Add": _both(mx.add),
    "And": _both(mx.logical_and),
    "Cast": _cast,
    "Concat": _concat,
    "Cos": _one(mx.cos),
    "CumSum": _cumsum,
    "DequantizeLinear": _dequantize,
    "Div": _both(lambda a, b: a // b if mx.issubdtype(a.dtype, mx.integer) else a / b),
    "DynamicQuantizeLinear": _dynamic_quantize,
    "Equal": _both(mx.equal),
    "Erf": _one(mx.erf),
    "Exp": _one(mx.exp),
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _both(mx.greater),
    "Identity": lambda x, a: x[0],
    "LayerNormalization": _layer_norm,
    "Less": _both(mx.less),
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "Max": _both(mx.maximum),
    "Min": _both(mx.minimum),
    "Mul": _both(mx.multiply),
    "Neg": _one(mx.negative),
    "Not": _one(mx.logical_not),
    "Or": _both(mx.logical_or),
    "Pow": _both(mx.power),
    "QuantizeLinear": _quantize,
    "Reciprocal": _one(mx.reciprocal),
    "ReduceMax": _reduce(mx.max),
    "ReduceMean": _reduce(mx.mean),
    "ReduceSum": _reduce(mx.sum),
    "Relu": _one(lambda x: mx.maximum(x, 0)),
    "Reshape": _reshape,
    "Shape": lambda x, a: np.array(x[0].shape[a.get("start", 0) : a.get("end")], np.int64),
    "Sigmoid": _one(mx.sigmoid),
    "Sin": _one(mx.sin),
    "Slice": _slice,
    "Softmax": lambda x, a: mx.softmax(_array(x[0]), a.get("axis", -1), precise=True),
    "Split": _split,
    "Sqrt": _one(mx.sqrt),
    "Squeeze": _squeeze,
    "Sub": _both(mx.subtract),
    "Tanh": _one(mx.tanh),
    "Transpose": lambda x, a: mx.transpose(_array(x[0]), a["perm"]),
    "Unsqueeze": lambda x, a: mx.expand_dims(_array(x[0]), ints(x[1])),
    "Where": lambda x, a: mx.where(_array(x[0]), _array(x[1]), _array(x[2])),
}
