"""The one representation of a compressed linear layer, whichever algorithm or library produced it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vla_edge.types import freeze


@dataclass(frozen=True)
class QuantizedWeight:
    """Symmetric integers with scales: weight = values * scales.

    Attributes:
        values: (out, in) int8, within +-(2**(bits - 1) - 1); 4-bit values are not packed here.
        scales: (out,) float32 for one scale per output channel, (out, in / group_size) for one per group.
        bits: 8 or 4.
        group_size: consecutive inputs that share a scale, None for the whole channel.
    """

    values: np.ndarray
    scales: np.ndarray
    bits: int
    group_size: int | None = None

    def __post_init__(self):
        values = freeze(self.values, np.int8, (None, None), "QuantizedWeight.values")
        rows, columns = values.shape
        if self.group_size is not None and columns % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {columns} inputs")
        limit = 2 ** (self.bits - 1) - 1
        if values.size and (values.min() < -limit or values.max() > limit):
            raise ValueError(f"{self.bits}-bit values must lie within +-{limit}")
        shape = (rows,) if self.group_size is None else (rows, columns // self.group_size)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "scales", freeze(self.scales, np.float32, shape, "QuantizedWeight.scales"))

    def dequantize(self) -> np.ndarray:
        """(out, in) float32: the weight every runtime computes with."""
        if self.group_size is None:
            return self.values * self.scales[:, None]
        rows, columns = self.values.shape
        grouped = self.values.reshape(rows, -1, self.group_size) * self.scales[:, :, None]
        return grouped.reshape(rows, columns)

    @property
    def reduced_range(self) -> bool:
        """Whether one bit of 8 stays unused, see `round_to_nearest`."""
        return self.bits == 8 and bool(np.abs(self.values.astype(np.int16)).max(initial=0) <= 63)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed integers and scales."""
        return -(-self.values.size * self.bits // 8) + self.scales.nbytes


@dataclass(frozen=True)
class ActivationQuant:
    """How a layer's input is rounded to 8 bits.

    Attributes:
        kind: "static", with scale and zero point fixed by calibration, or "dynamic", with both found at each call.
        scale: size of one step, static only.
        zero_point: the integer that stands for 0, static only; 0 to 255, inputs are unsigned.
    """

    kind: Literal["static", "dynamic"]
    scale: float = 0.0
    zero_point: int = 0

    def __post_init__(self):
        if self.kind == "static" and not (self.scale > 0 and 0 <= self.zero_point <= 255):
            raise ValueError(f"scale {self.scale} and zero point {self.zero_point} do not describe 8 unsigned bits")


@dataclass(frozen=True)
class CompressedLinear:
    """What becomes of one `nn.Linear`.

    Attributes:
        weight: quantized, or (out, in) float32 or float16 to be kept as it is.
        bias: (out,) float32, or None.
        activation: None leaves the input in float32.
    """

    weight: QuantizedWeight | np.ndarray
    bias: np.ndarray | None = None
    activation: ActivationQuant | None = None

    @property
    def quantized(self) -> bool:
        return isinstance(self.weight, QuantizedWeight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.weight.values if self.quantized else self.weight).shape

    @property
    def precision(self) -> str:
        """Of the weight: "int8", "int4", "float32" or "float16"."""
        return f"int{self.weight.bits}" if self.quantized else str(self.weight.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight on disk, without the bias."""
        return self.weight.nbytes

    def effective_weight(self) -> np.ndarray:
        """(out, in) float32 that a runtime computes with."""
        return self.weight.dequantize() if self.quantized else self.weight.astype(np.float32)

    def describe(self) -> dict:
        """A row of the manifest's table of layers."""
        row = {"shape": list(self.shape), "weights": self.precision}
        if self.quantized and self.weight.group_size is not None:
            row["group_size"] = self.weight.group_size
        if self.quantized and self.weight.reduced_range:
            row["reduced_range"] = True
        row["activations"] = {None: "float32", "static": "int8", "dynamic": "int8-dynamic"}[
            self.activation and self.activation.kind
        ]
        return row


def weight_fractions(layers: Mapping[str, CompressedLinear]) -> dict[str, float]:
    """Precision -> share of all matrix weights, most common first."""
    counts: dict[str, int] = {}
    for layer in layers.values():
        counts[layer.precision] = counts.get(layer.precision, 0) + layer.shape[0] * layer.shape[1]
    total = sum(counts.values()) or 1
    return {precision: counts[precision] / total for precision in sorted(counts, key=counts.get, reverse=True)}
