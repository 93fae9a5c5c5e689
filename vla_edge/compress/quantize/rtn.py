"""Round to nearest: each weight goes to the closest point of its grid, nothing else moves.

The baseline of every quantization paper, and for 8 bits per channel usually all that is needed.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.quantize.formats import Format
from vla_edge.compress.quantize.weights import QuantizedWeight

# Runtimes have fast kernels for groups of 16 and powers of two above; smaller ones cost more than they save.
SMALLEST_FAST_GROUP = 16


def round_to_nearest(weight: np.ndarray, grid: Format, group_size: int | None = None) -> QuantizedWeight:
    """Symmetric quantization of (out, in) float weights.

    Args:
        group_size: inputs per scale; None for one scale per output channel. Where it does not divide the inputs, the
            largest group that `fitting_group` finds takes its place.
    """
    weight = np.asarray(weight, np.float32)
    group = fitting_group(weight.shape[1], group_size) if group_size is not None else None
    return round_on_grid(weight, grid_steps(weight, grid, group), grid, group)


def grid_steps(weight: np.ndarray, grid: Format, group: int | None) -> np.ndarray:
    """(out,) or (out, in / group) float32 size of a step, the smallest with which no weight of a group is beyond the ends
    of its grid. `group` must divide the inputs."""
    rows, columns = weight.shape
    split = weight.reshape(rows, -1, group or columns)
    above, below = split.max(axis=-1) / np.float32(grid.largest), split.min(axis=-1) / np.float32(grid.smallest)
    steps = np.maximum(above, below).astype(np.float32)
    # a group of zeros has no step of its own; any will do, but none may be 0
    silent = steps < np.finfo(np.float32).tiny
    if silent.any():
        steps[silent] = 1.0 if silent.all() else steps.max()
    return steps if group else steps[:, 0]


def round_on_grid(weight: np.ndarray, steps: np.ndarray, grid: Format, group: int | None) -> QuantizedWeight:
    """(out, in) weights to the nearest points of the grid with `steps`, in the precision that these are stored in."""
    rows, columns = weight.shape
    scales, whole = grid.store_steps(steps)
    seen = (scales.astype(np.float32) * np.float32(whole)).reshape(rows, -1, 1)
    values = grid.nearest(weight.reshape(rows, -1, group or columns) / seen)
    return QuantizedWeight(values.reshape(rows, columns), scales, grid.name, group, whole)


def fitting_group(columns: int, group_size: int) -> int:
    """The group actually used for `columns` inputs: `group_size`, or the largest smaller one that divides them.

    Halves of the group size are tried first, since runtimes have kernels for powers of two; then any divisor of at
    least 8; then the whole channel.
    """
    group = group_size
    while group >= SMALLEST_FAST_GROUP:
        if columns % group == 0:
            return group
        group //= 2
    return next((g for g in range(min(group_size, columns), 7, -1) if columns % g == 0), columns)
