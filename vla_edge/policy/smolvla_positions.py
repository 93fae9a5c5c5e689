"""Which row of a SmolVLM's table of positions each patch reads, and a table that every reader reads alike.

transformers places patch i of g into row floor(i / g * s) of a table with s rows per side, and computes this in
floating point as (i / g) * (1 - 1e-6) against the boundaries k / s. Since 4.55.1 it does so in the type of the image.
In float32 with s == g, the natural choice, the factor puts every patch just below its boundary: rows and columns read
are 0, 0, 1, ..., g - 2, and the last row is never read. In bfloat16 the factor rounds to 1, and where g is a power of
two, as in the 450M original (g = 32), patch i reads row i. (huggingface/transformers issue 41190, repaired for
bfloat16 only.) Policies have been trained either way, so reading one means repeating the arithmetic it ran with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SPARE = 1  # rows per side of a written table that no patch reads


def read_table(table: Tensor, grid: int, dtype: torch.dtype) -> Tensor:
    """What transformers adds to the patches of an image.

    Args:
        table: (s * s, D). grid: g patches per side of the image. dtype: the vision tower's.

    Returns:
        (g * g, D), row by row.
    """
    side = math.isqrt(len(table))
    if side**2 != len(table):
        raise ValueError(f"a table of {len(table)} positions is not square")
    rows = _rows(grid, side, dtype)
    return table[(rows[:, None] * side + rows).flatten()]


def spare_table(positions: Tensor, grid: int) -> Tensor:
    """A table, one row per side larger than the image's (g * g, D) positions, of which patch i reads row i whatever the
    version of transformers, in float32 at any g and in bfloat16 up to 26: floor(i / g * (g + 1)) is i, and the factor
    is far from any boundary."""
    square = positions.reshape(grid, grid, -1)
    return F.pad(square, (0, 0, 0, SPARE, 0, SPARE)).flatten(0, 1)


def _rows(grid: int, side: int, dtype: torch.dtype) -> Tensor:
    # step for step as transformers rounds it; exact fractions would not tell what a policy was trained with
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(torch.arange(grid, dtype=dtype) / grid * (1 - 1e-6), boundaries, right=True)
