"""Compressed layers in PyTorch: what every engine made of them has to compute, to within the rounding of float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.compress.quantize.formats import FP8, INT4
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear


def round_inputs(x: Tensor, grid: ActivationQuant) -> Tensor:
    """`x` (..., in) as the grid shows it."""
    if grid.format == "int4":
        groups = x.unflatten(-1, (-1, grid.group_size))
        step = (groups.abs().amax(-1, keepdim=True) / INT4.largest).clamp_min(torch.finfo(x.dtype).tiny)
        return ((groups / step).round().clamp(-INT4.largest, INT4.largest) * step).flatten(-2)
    if grid.format == "fp8":
        scaled = (x / grid.scale).clamp(-FP8.largest, FP8.largest)
        return scaled.to(torch.float8_e4m3fn).to(x.dtype) * grid.scale
    scale, zero = grid.scale, grid.zero_point
    if grid.kind == "dynamic":  # as ONNX's DynamicQuantizeLinear
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(x.dtype).tiny)
        zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale


class FakeLinear(nn.Module):
    """A compressed layer that computes in floating point with the values an engine stores.

    Args:
        layer: what becomes of an `nn.Linear`.
    """

    def __init__(self, layer: CompressedLinear):
        super().__init__()
        self.activation = layer.activation
        # without rounding of the input it is all one product
        apart = layer.activation is not None
        values = {
            "weight": layer.dense_weight() if apart else layer.effective_weight(),
            "bias": layer.bias,
            "low_rank": layer.low_rank.dequantize() if apart and layer.low_rank is not None else None,
            "input_scale": layer.input_scale if apart else None,
        }
        for name, value in values.items():
            self.register_buffer(name, None if value is None else torch.from_numpy(np.array(value, np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        seen = x if self.input_scale is None else x * self.input_scale
        if self.activation is not None:
            seen = round_inputs(seen, self.activation)
        out = F.linear(seen, self.weight, self.bias)
        return out if self.low_rank is None else out + F.linear(x, self.low_rank)


@contextmanager
def installed(modules: Mapping[str, nn.Linear], layers: Mapping[str, CompressedLinear]) -> Iterator[None]:
    """Inside, the policy computes with `layers` in place of its own.

    Args:
        modules: "stage.path" -> `nn.Linear` of the policy. layers: by the same names, not necessarily all of them.
    """
    try:
        for name, layer in layers.items():
            modules[name].forward = FakeLinear(layer).forward
        yield
    finally:
        for name in layers:
            modules[name].__dict__.pop("forward", None)
