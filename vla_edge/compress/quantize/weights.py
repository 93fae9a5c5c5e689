"""The one representation of a compressed linear layer, whichever algorithm or library produced it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vla_edge.compress.quantize.formats import Format, number_format
from vla_edge.types import freeze


@dataclass(frozen=True)
class QuantizedWeight:
    """Points of a grid with scales: weight = values * scales * tensor_scale.

    Attributes:
        values: (out, in) in the format's type; 4-bit values are not packed here.
        scales: (out,) for one scale per output channel, (out, in / group_size) for one per group; in the precision
            that they are stored in (see `Format.store_steps`).
        format: name of the grid, see `formats`.
        group_size: consecutive inputs that share a scale, None for the whole channel.
        tensor_scale: second level of the scales (NVFP4), 1 elsewhere.
    """

    values: np.ndarray
    scales: np.ndarray
    format: str
    group_size: int | None = None
    tensor_scale: float = 1.0

    def __post_init__(self):
        grid = number_format(self.format)
        values = np.asarray(self.values)
        seen = values.astype(np.float32, copy=False)
        smallest, largest = float(seen.min(initial=0)), float(seen.max(initial=0))
        lowest = replace(grid, full=grid.is_integer).smallest
        if not (lowest <= smallest and largest <= grid.largest):
            raise ValueError(f"{self.format} values must lie within {lowest:g} to {grid.largest:g}")
        values = freeze(values, grid.dtype, (None, None), "QuantizedWeight.values")
        rows, columns = values.shape
        if self.group_size is not None and columns % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {columns} inputs")
        shape = (rows,) if self.group_size is None else (rows, columns // self.group_size)
        scales = np.asarray(self.scales)
        kind = np.float32 if scales.dtype.kind == "f" and scales.dtype.itemsize > 2 else scales.dtype
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "scales", freeze(scales, kind, shape, "QuantizedWeight.scales"))

    @property
    def grid(self) -> Format:
        """The points that values are of: all integers of 8 bits where the most negative one is among them."""
        grid = number_format(self.format)
        return replace(grid, full=grid.full or grid.is_integer and bool(self.values.min(initial=0) < grid.smallest))

    @property
    def steps(self) -> np.ndarray:
        """Sizes of a step in float32, in the shape of `scales`."""
        return self.scales.astype(np.float32) * np.float32(self.tensor_scale)

    def dequantize(self) -> np.ndarray:
        """(out, in) float32: the weight every runtime computes with."""
        rows, columns = self.values.shape
        grouped = self.values.astype(np.float32).reshape(rows, -1, self.group_size or columns)
        return (grouped * self.steps.reshape(rows, -1, 1)).reshape(rows, columns)

    @property
    def reduced_range(self) -> bool:
        """Whether one bit of 8 stays unused, see `formats.number_format`."""
        return self.format == "int8" and bool(np.abs(self.values.astype(np.int16)).max(initial=0) <= 63)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed values and scales."""
        second = 4 if self.tensor_scale != 1.0 else 0
        return -(-self.values.size * self.grid.bits // 8) + self.scales.nbytes + second


@dataclass(frozen=True)
class ActivationQuant:
    """How a layer's input is rounded.

    Attributes:
        kind: "static", with scale and zero point fixed by calibration, or "dynamic", with both found at each call.
        scale: size of one step, static only.
        zero_point: the integer that stands for 0, static int8 only; 0 to 255, such inputs are unsigned.
        format: "int8" or "fp8" when static; "int8" (unsigned, one scale for the tensor) or "int4" (symmetric, one
            scale for each group of channels) when dynamic.
        group_size: channels that share a scale, dynamic int4 only; divides the layer's inputs.
    """

    kind: Literal["static", "dynamic"]
    scale: float = 0.0
    zero_point: int = 0
    format: str = "int8"
    group_size: int | None = None

    def __post_init__(self):
        if self.kind == "static" and not (self.scale > 0 and 0 <= self.zero_point <= 255):
            raise ValueError(f"scale {self.scale} and zero point {self.zero_point} do not describe 8 unsigned bits")
        if (self.format == "int4") != (self.group_size is not None):
            raise ValueError("inputs in int4 have a group size, others have none")


@dataclass(frozen=True)
class LowRank:
    """A product through few channels: weight = up @ down.

    Attributes:
        down: (rank, in), up: (out, rank); float32 or float16, as they are stored.
    """

    down: np.ndarray
    up: np.ndarray

    def __post_init__(self):
        for name in ("down", "up"):
            value = getattr(self, name)
            object.__setattr__(self, name, freeze(value, value.dtype, (None, None), f"LowRank.{name}"))
        if self.down.shape[0] != self.up.shape[1]:
            raise ValueError(f"factors of rank {self.down.shape[0]} and {self.up.shape[1]} do not fit")

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def dequantize(self) -> np.ndarray:
        """(out, in) float32."""
        return self.up.astype(np.float32) @ self.down.astype(np.float32)


@dataclass(frozen=True)
class CompressedLinear:
    """What becomes of one `nn.Linear`: y = weight rounded(x * input_scale) + low_rank x + bias.

    Attributes:
        weight: quantized, or (out, in) float32, float16 or bfloat16 to be kept as it is; None where `low_rank` is all.
        bias: (out,) float32, or None.
        activation: how x is rounded before the product with `weight`; None leaves it in float32.
        low_rank: a branch that sees x as it is, or None.
        input_scale: (in,) float32 by which x is multiplied at run time where that could not be moved into the layer
            before; None where nothing is.
    """

    weight: QuantizedWeight | np.ndarray | None
    bias: np.ndarray | None = None
    activation: ActivationQuant | None = None
    low_rank: LowRank | None = None
    input_scale: np.ndarray | None = None

    def __post_init__(self):
        if self.input_scale is not None:
            scale = freeze(self.input_scale, np.float32, (self.shape[1],), "CompressedLinear.input_scale")
            object.__setattr__(self, "input_scale", scale)
        if self.weight is None and (self.low_rank is None or self.activation is not None):
            raise ValueError("a layer without a weight is its low-rank factors and rounds nothing")

    @property
    def quantized(self) -> bool:
        return isinstance(self.weight, QuantizedWeight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if self.weight is None:
            return self.low_rank.up.shape[0], self.low_rank.down.shape[1]
        return (self.weight.values if self.quantized else self.weight).shape

    @property
    def precision(self) -> str:
        """Of the weight: a format's name, or "float32", "float16", "bfloat16"."""
        if self.quantized:
            return self.weight.format
        return str((self.low_rank.down if self.weight is None else self.weight).dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights on disk, without the bias."""
        return sum(part.nbytes for part in (self.weight, self.low_rank, self.input_scale) if part is not None)

    def dense_weight(self) -> np.ndarray:
        """(out, in) float32 that rounded inputs meet."""
        if self.weight is None:
            return np.zeros(self.shape, np.float32)
        return self.weight.dequantize() if self.quantized else self.weight.astype(np.float32)

    def effective_weight(self) -> np.ndarray:
        """(out, in) float32 that stands for what a runtime computes with x, all parts together."""
        dense = self.dense_weight()
        if self.input_scale is not None:
            dense = dense * self.input_scale
        return dense if self.low_rank is None else dense + self.low_rank.dequantize()

    def describe(self) -> dict:
        """A row of the manifest's table of layers."""
        row = {"shape": list(self.shape), "weights": self.precision, "bytes": self.nbytes}
        if self.quantized and self.weight.group_size is not None:
            row["group_size"] = self.weight.group_size
        if self.quantized and self.weight.reduced_range:
            row["reduced_range"] = True
        if self.low_rank is not None:
            row["rank"] = self.low_rank.rank
        if self.input_scale is not None:
            row["input_scale"] = True
        zeros = self.sparsity
        if zeros >= 0.25:  # rounding to 4 bits alone gives a tenth
            row["sparsity"] = round(zeros, 3)
        activation = self.activation
        if activation is None:
            row["activations"] = "float32"
        else:
            row["activations"] = activation.format + ("-dynamic" if activation.kind == "dynamic" else "")
        return row

    @property
    def sparsity(self) -> float:
        """Share of the weights that are exactly 0."""
        if self.weight is None:
            return 0.0
        stored = self.weight.values if self.quantized else self.weight
        return float(1 - np.count_nonzero(stored.astype(np.float32)) / max(stored.size, 1))


def weight_fractions(layers: Mapping[str, CompressedLinear]) -> dict[str, float]:
    """Precision -> share of all matrix weights, most common first."""
    counts: dict[str, int] = {}
    for layer in layers.values():
        counts[layer.precision] = counts.get(layer.precision, 0) + layer.shape[0] * layer.shape[1]
    total = sum(counts.values()) or 1
    return {precision: counts[precision] / total for precision in sorted(counts, key=counts.get, reverse=True)}
