"""The grids that weights and inputs are rounded to.

8-bit integers are kept symmetric: the most negative one is left out, which other libraries use, see `providers`. Of 4 bits
it is a sixteenth of the points, and used: groups whose largest weight is negative get smaller steps.
FP8 is E4M3 without infinities (Micikevicius et al., 2022, arXiv:2209.05433); FP4 is E2M1, as in the OCP microscaling
formats and NVFP4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = ("int8", "int4", "fp8", "nvfp4")
NVFP4_GROUP = 16


@dataclass(frozen=True)
class Format:
    """One grid.

    Attributes:
        name: "int8", "int4", "fp8" or "nvfp4".
        bits: of one value.
        largest: its last point.
        full: whether integers have one more point below the negative of the last.
    """

    name: str
    bits: int
    largest: float
    full: bool = False

    @property
    def smallest(self) -> float:
        """Its first point."""
        return -self.largest - self.full

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """float32 points of the grid closest to `values`; what lies beyond goes to its end."""
        clipped = np.clip(values, self.smallest, self.largest)
        if self.is_integer:
            return np.rint(clipped, out=clipped)
        return clipped.astype(self.dtype).astype(np.float32)

    def nearest_(self, values):
        """The same of a tensor in its place, integers with all of PyTorch's threads."""
        import torch

        if self.is_integer:
            return values.round_().clamp_(self.smallest, self.largest)
        return values.copy_(torch.from_numpy(self.nearest(values.numpy())))

    @property
    def is_integer(self) -> bool:
        return self.name.startswith("int")

    @property
    def dtype(self) -> np.dtype:
        """That holds a value in memory; 4-bit values are not packed there."""
        if self.is_integer:
            return np.dtype(np.int8)
        import ml_dtypes  # numpy itself has no such types

        return np.dtype(ml_dtypes.float8_e4m3fn if self.name == "fp8" else ml_dtypes.float4_e2m1fn)

    def store_steps(self, steps: np.ndarray) -> tuple[np.ndarray, float]:
        """float32 sizes of a step -> (scales as they are stored, scale of the whole matrix).

        One scale per channel stays float32. Groups are many: theirs are float16 where that holds them with its full
        precision, and for NVFP4 FP8 with one more scale above them.
        """
        if self.name == "nvfp4":
            import ml_dtypes

            whole = np.float32(steps.max() / np.float32(448.0))
            # at least the smallest number FP8 has: a group without a scale would lose everything
            return np.maximum(steps / whole, np.float32(2.0**-9)).astype(ml_dtypes.float8_e4m3fn), float(whole)
        half = np.finfo(np.float16)
        sizes = np.abs(steps)  # some libraries turn the sign of a whole group
        if steps.ndim == 2 and sizes.min() >= half.smallest_normal and sizes.max() <= half.max:
            return steps.astype(np.float16), 1.0
        return np.asarray(steps, np.float32), 1.0


_FORMATS = {"int8": (8, 127.0), "int4": (4, 7.0), "fp8": (8, 448.0), "nvfp4": (4, 6.0)}


def number_format(name: str, reduce_range: bool = False) -> Format:
    """The grid called `name`.

    Args:
        reduce_range: of int8: use one bit less, so that the sum of two products with 8-bit inputs fits into 16 bits
            (2 * 63 * 255 < 2**15), which is what the fast instructions of x86-64 without VNNI add up in.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _FORMATS:
        raise ValueError(f"{name!r} is no number format; there are {', '.join(NAMES)}")
    bits, largest = _FORMATS[name]
    return Format(name, bits, 63.0 if reduce_range and name == "int8" else largest, full=name == "int4")


INT8, INT4, FP8, NVFP4 = (number_format(name) for name in NAMES)
