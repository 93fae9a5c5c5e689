"""A stage file as a PyTorch module: standard ONNX operators, weights dequantized when it is loaded.

Nothing but the file's data is read, so a bundle needs no pickle, no exported program and no compiled library. Shapes
are static: what the file computes of shapes is computed while tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_edge.engine.backends import BackendError, StageInterface, one_line
from vla_edge.engine.backends.onnx_program import ints, read_program

_DTYPES = {1: torch.float32, 3: torch.int8, 2: torch.uint8, 6: torch.int32, 7: torch.int64, 9: torch.bool}
_DTYPES |= {10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


def read_module(path: str | Path, stage: StageInterface) -> torch.fx.GraphModule:
    """The file as a traced module that takes the stage's inputs in order and returns its outputs as a tuple.

    Raises:
        BackendError: the file cannot be read, has other tensors, or an operator that is not known here.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    program = read_program(path, stage, OPERATORS, _tensor, "PyTorch")
    examples = [torch.from_numpy(spec.zeros()) for spec in stage.inputs]
    names, wanted = [spec.name for spec in stage.inputs], [spec.name for spec in stage.outputs]
    try:
        with torch.no_grad():
            return make_fx(lambda *tensors: program(dict(zip(names, tensors)), wanted))(*examples)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"PyTorch cannot run stage file {path}: {one_line(error)}") from error


def in_float32(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`module`, changed in place to compute in float32 what its file computes in float64, and to hold in it what the file
    holds in bfloat16, for runtimes without these.

    Angles of a time embedding are float64: at 1,000 rad they lose the digits after the fourth.
    """
    for node in module.graph.nodes:
        if node.kwargs.get("dtype") == torch.float64:
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
        constant = getattr(module, node.target) if node.op == "get_attr" else None
        if isinstance(constant, Tensor) and constant.dtype in (torch.float64, torch.bfloat16):
            setattr(module, node.target, constant.to(torch.float32))
    module.recompile()
    return module


def _tensor(value) -> Tensor:
    return torch.from_numpy(np.array(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def _reshape(x, attributes):
    tensor, shape = _tensor(x[0]), ints(x[1])
    if not attributes.get("allowzero"):
        shape = [tensor.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return tensor.reshape(shape)


def _expand(x, attributes):
    tensor = _tensor(x[0])
    return tensor.expand(np.broadcast_shapes(tuple(tensor.shape), tuple(ints(x[1])))).clone()


def _unsqueeze(x, attributes):
    tensor = _tensor(x[0])
    rank = tensor.dim() + len(ints(x[1]))
    for axis in sorted(axis % rank for axis in ints(x[1])):
        tensor = tensor.unsqueeze(axis)
    return tensor


def _squeeze(x, attributes):
    tensor = _tensor(x[0])
    return tensor.squeeze(tuple(ints(x[1]))) if len(x) > 1 else tensor.squeeze()


def _concat(x, attributes):
    if all(isinstance(value, np.ndarray) for value in x):
        return np.concatenate(x, attributes["axis"])
    return torch.cat([_tensor(value) for value in x], attributes["axis"])


def _split(x, attributes):
    tensor, axis = _tensor(x[0]), attributes.get("axis", 0)
    if len(x) > 1 and x[1] is not None:
        return tuple(tensor.split(ints(x[1]), axis))
    return tuple(tensor.split(-(-tensor.shape[axis] // attributes["num_outputs"]), axis))


def _slice(x, attributes):
    tensor = _tensor(x[0])
    starts, ends = ints(x[1]), ints(x[2])
    axes = ints(x[3]) if len(x) > 3 and x[3] is not None else list(range(len(starts)))
    steps = ints(x[4]) if len(x) > 4 and x[4] is not None else [1] * len(starts)
    if min(steps) < 1:
        raise BackendError("PyTorch's reader of stage files does not know a Slice that runs backwards")
    for axis, start, end, step in zip(axes, starts, ends, steps):
        length = tensor.shape[axis]
        low, high = (min(max(i + length if i < 0 else i, 0), length) for i in (start, end))
        tensor = tensor[(slice(None),) * (axis % tensor.dim()) + (slice(low, high, step),)]
    return tensor


def _gather(x, attributes):
    axis = attributes.get("axis", 0)
    if isinstance(x[0], np.ndarray) and isinstance(x[1], np.ndarray) and x[0].dtype.kind == "i":
        return np.take(x[0], x[1], axis)
    tensor = _tensor(x[0])
    axis %= tensor.dim()
    if isinstance(x[1], (np.ndarray, np.generic)):
        index = torch.from_numpy(np.asarray(np.asarray(x[1], np.int64) % tensor.shape[axis]))
    else:
        index = torch.where(x[1] < 0, x[1] + tensor.shape[axis], x[1]).long()
    picked = tensor.index_select(axis, index.reshape(-1))
    return picked.reshape(*tensor.shape[:axis], *index.shape, *tensor.shape[axis + 1 :])


def _reduce(function: Callable):
    def run(x, attributes):
        tensor = _tensor(x[0])
        axes = ints(x[1]) if len(x) > 1 and x[1] is not None else list(range(tensor.dim()))
        return function(tensor, axes, bool(attributes.get("keepdims", 1)))

    return run


def _layer_norm(x, attributes):
    tensor, axis = _tensor(x[0]), attributes.get("axis", -1)
    bias = _tensor(x[2]) if len(x) > 2 and x[2] is not None else None
    return F.layer_norm(tensor, tensor.shape[axis:], _tensor(x[1]), bias, attributes.get("epsilon", 1e-5))


def _cumsum(x, attributes):
    if attributes.get("exclusive") or attributes.get("reverse"):
        raise BackendError("PyTorch's reader of stage files does not know this kind of CumSum")
    return _tensor(x[0]).cumsum(ints(x[1])[0])


def _gemm(x, attributes):
    a, b = (_tensor(value) for value in x[:2])
    product = attributes.get("alpha", 1.0) * (
        (a.T if attributes.get("transA") else a) @ (b.T if attributes.get("transB") else b)
    )
    return product + attributes.get("beta", 1.0) * _tensor(x[2]) if len(x) > 2 and x[2] is not None else product


def _per_channel(parameter, x: Tensor, attributes: Mapping):
    """Scales or zero points in a shape that multiplies `x`: of the whole, of channels, or of blocks of an axis."""
    parameter = _tensor(parameter)
    axis, block = attributes.get("axis", 1) % x.dim(), attributes.get("block_size", 0)
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return parameter if parameter.numel() == 1 else parameter.reshape([-1] + [1] * (x.dim() - axis - 1))


def _dequantize(x, attributes):
    values = _tensor(x[0])
    scale = _per_channel(x[1], values, attributes)
    centred = values.to(torch.float32)
    if len(x) > 2 and x[2] is not None:
        # cast before it enters the graph: not every compiler that takes the module has unsigned integers
        zero = x[2].astype(np.float32) if isinstance(x[2], np.ndarray) else x[2]
        centred = centred - _per_channel(zero, values, attributes)
    return centred * scale


def _quantize(x, attributes):
    values = _tensor(x[0])
    scaled = values / _per_channel(x[1], values, attributes)
    if len(x) > 2 and x[2] is not None:
        zero = x[2]
        if not (isinstance(zero, np.ndarray) and zero.dtype in (np.int8, np.uint8)):
            raise BackendError("PyTorch's reader of stage files rounds inputs to 8-bit integers only")
        low, high = (0, 255) if zero.dtype == np.uint8 else (-128, 127)
        centre = _per_channel(zero.astype(np.float32), values, attributes)
        return (scaled.round() + centre).clamp(low, high)
    if attributes.get("output_dtype") != 22:  # INT4
        raise BackendError("PyTorch's reader of stage files rounds inputs to integers only")
    return scaled.round().clamp(-8, 7)


def _dynamic_quantize(x, attributes):
    low, high = x[0].amin().clamp(max=0), x[0].amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255)
    return (x[0] / scale).round().add(zero).clamp(0, 255), scale, zero


def _matmul_integer(x, attributes):
    a, b = (_tensor(value).to(torch.float64) for value in x[:2])
    zeros = [_tensor(value).to(torch.float64) if value is not None else 0.0 for value in (*x[2:], None, None)[:2]]
    return ((a - zeros[0]) @ (b - zeros[1])).to(torch.float32)


def _both(function: Callable):
    return lambda x, attributes: function(_tensor(x[0]), _tensor(x[1]))


def _one(function: Callable):
    return lambda x, attributes: function(_tensor(x[0]))


def _conv(x, attributes):
    """Those that `engine.convolutions` writes, and depthwise ones: as much padding before as behind."""
    kernel = _tensor(x[1])
    axes = kernel.ndim - 2
    convolve = F.conv1d if axes == 1 else F.conv2d
    bias = _tensor(x[2]) if len(x) > 2 else None
    pads, groups = attributes["pads"][:axes], attributes.get("group", 1)
    return convolve(_tensor(x[0]), kernel, bias, attributes["strides"], pads, groups=groups)


def _max_pool(x, attributes):
    return F.max_pool2d(_tensor(x[0]), attributes["kernel_shape"], attributes["strides"], attributes["pads"][:2])


def _pad(x, attributes):
    before, after = np.split(np.array(ints(x[1])), 2)
    return F.pad(_tensor(x[0]), np.stack([before, after], 1)[::-1].ravel().tolist())


OPERATORS: dict[str, Callable] = {
    "Abs": _one(torch.abs),
    "Add": _both(torch.add),
    "And": _both(torch.logical_and),
    "Cast": lambda x, a: _tensor(x[0]).to(_DTYPES[a["to"]]),
    "Concat": _concat,
    "Conv": _conv,
    "Cos": _one(torch.cos),
    "CumSum": _cumsum,
    "DequantizeLinear": _dequantize,
    "Div": _both(torch.div),
    "DynamicQuantizeLinear": _dynamic_quantize,
    "Equal": _both(torch.eq),
    "Erf": _one(torch.erf),
    "Exp": _one(torch.exp),
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": lambda x, a: F.gelu(_tensor(x[0]), approximate=a.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "Greater": _both(torch.gt),
    "Identity": _one(lambda x: x),
    "LayerNormalization": _layer_norm,
    "Less": _both(torch.lt),
    "MatMul": _both(torch.matmul),
    "MatMulInteger": _matmul_integer,
    "Max": _both(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _both(torch.minimum),
    "Mul": _both(torch.mul),
    "Neg": _one(torch.neg),
    "Not": _one(torch.logical_not),
    "Or": _both(torch.logical_or),
    "Pad": _pad,
    "Pow": _both(torch.pow),
    "QuantizeLinear": _quantize,
    "Reciprocal": _one(torch.reciprocal),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "Relu": _one(torch.relu),
    "Reshape": _reshape,
    "Shape": lambda x, a: np.array(x[0].shape[a.get("start", 0) : a.get("end")], np.int64),
    "Sigmoid": _one(torch.sigmoid),
    "Sin": _one(torch.sin),
    "Slice": _slice,
    "Softmax": lambda x, a: F.softmax(_tensor(x[0]), a.get("axis", -1)),
    "Softplus": _one(F.softplus),
    "Split": _split,
    "Sqrt": _one(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _both(torch.sub),
    "Tanh": _one(torch.tanh),
    "Transpose": lambda x, a: _tensor(x[0]).permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
    "Where": lambda x, a: torch.where(_tensor(x[0]), _tensor(x[1]), _tensor(x[2])),
}
