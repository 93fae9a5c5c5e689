"""4-bit values, two in a byte, the first in the low half: ONNX's layout of INT4 and FLOAT4E2M1."""

from __future__ import annotations

import numpy as np


def pack_4_bits(codes: np.ndarray) -> np.ndarray:
    """Flat uint8 of 4-bit values that lie in a byte each; an odd one is filled up with 0."""
    flat = np.ascontiguousarray(codes).ravel().astype(np.uint8) & 0x0F
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return flat[0::2] | (flat[1::2] << 4)


def unpack_signed(packed: np.ndarray, count: int) -> np.ndarray:
    """Inverse of `pack_4_bits` for integers of -8 to 7: (count,) int8."""
    values = np.empty(2 * packed.size, np.int8)
    values[0::2], values[1::2] = (packed << 4).view(np.int8) >> 4, packed.view(np.int8) >> 4
    return values[:count]
