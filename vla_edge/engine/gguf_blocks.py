"""Quantized weights in the blocks of GGUF, llama.cpp's file format, every code as it is.

    Q4_0    32 weights of 4 bits and a float16 scale: the 16 bytes hold weight i in the low half, i + 16 in the high one
    Q8_0    32 weights of 8 bits and a float16 scale

Both are symmetric, weight = code * scale, the grids that `compress.quantize` rounds to. A larger group, or a whole
channel, is written as several blocks with one and the same scale. Scales in float32 (of whole channels) are rounded to
float16, by 0.05 % at most; those of groups are float16 already.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.types import VlaEdgeError

BLOCK = 32
# format -> name of the block type in GGUF
TYPES = {"int4": "Q4_0", "int8": "Q8_0"}


class BlockError(VlaEdgeError):
    """Weights that GGUF's blocks cannot hold as they are."""


def blocks(weight: QuantizedWeight, name: str) -> np.ndarray:
    """(out, bytes of a row) uint8, the blocks of each output channel in order.

    Args:
        name: of the layer, for the error.

    Raises:
        BlockError: what GGUF cannot hold, and what recipe it can.
    """
    rows, columns = weight.values.shape
    group = weight.group_size or columns
    if weight.format not in TYPES:
        raise BlockError(f"{name} has {weight.format} weights, and GGUF's blocks hold int4 and int8: {_FITS}")
    if columns % BLOCK or group % BLOCK:
        raise BlockError(
            f"{name} has {columns} inputs in groups of {group}, and GGUF's blocks are of {BLOCK} inputs: {_FITS}"
        )
    scales = np.repeat(weight.steps.reshape(rows, -1), group // BLOCK, axis=1)
    with np.errstate(over="ignore"):  # said below
        stored = scales.astype(np.float16)
    if not np.isfinite(stored).all() or (stored == 0)[scales != 0].any():
        raise BlockError(f"{name} has scales that float16 cannot hold, as GGUF's blocks do; keep it in float16 instead")
    codes = weight.values.astype(np.int8).reshape(rows, -1, BLOCK)
    if weight.format == "int4":
        halves = (codes + 8).astype(np.uint8).reshape(rows, -1, 2, BLOCK // 2)
        packed = halves[:, :, 0] | (halves[:, :, 1] << 4)
    else:
        packed = codes.view(np.uint8)
    steps = np.ascontiguousarray(stored).view(np.uint8).reshape(rows, -1, 2)
    return np.concatenate([steps, packed], axis=2).reshape(rows, -1)


_FITS = (
    "quantize with `weights: int4` or `weights: int8` and `group_size: 32`, and with nothing that rounds inputs, or keep "
    "the layer"
)
