"""Round to nearest: each weight goes to the closest point of its grid, nothing else moves.

The baseline of every quantization paper, and for 8 bits per channel usually all that is needed.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.quantize.weights import QuantizedWeight

# Runtimes have fast kernels for groups of 16 and powers of two above; smaller ones cost more than they save.
SMALLEST_FAST_GROUP = 16


def round_to_nearest(
    weight: np.ndarray, bits: int, group_size: int | None = None, reduce_range: bool = False
) -> QuantizedWeight:
    """Symmetric quantization of (out, in) float weights.

    Args:
        group_size: inputs per scale; None for one scale per output channel. Where it does not divide the inputs, the
            largest group that `fitting_group` finds takes its place.
        reduce_range: use one bit less, so that the sum of two products with 8-bit inputs fits into 16 bits
            (2 * 63 * 255 < 2**15), which is what the fast instructions of x86-64 without VNNI add up in.
    """
    weight = np.asarray(weight, np.float32)
    group = fitting_group(weight.shape[1], group_size) if group_size is not None else None
    return round_on_grid(weight, grid_scales(weight, bits, group, reduce_range), bits, group, reduce_range)


def grid_scales(weight: np.ndarray, bits: int, group: int | None, reduce_range: bool = False) -> np.ndarray:
    """(out,) or (out, in / group) float32 size of a step, with which the largest weight of a group is the last point of
    its grid. `group` must divide the inputs."""
    rows, columns = weight.shape
    largest = np.abs(weight.reshape(rows, -1, group or columns)).max(axis=-1)
    scales = (largest / np.float32(2 ** (bits - 1 - reduce_range) - 1)).astype(np.float32)
    # a group of zeros has no scale of its own; any will do, but none may be 0
    scales = np.where(scales < np.finfo(np.float32).tiny, np.float32(1.0), scales)
    return scales if group else scales[:, 0]


def round_on_grid(
    weight: np.ndarray, scales: np.ndarray, bits: int, group: int | None, reduce_range: bool = False
) -> QuantizedWeight:
    """(out, in) weights to the nearest points of the grid that `scales` span; what lies beyond goes to its end."""
    rows, columns = weight.shape
    limit = 2 ** (bits - 1 - reduce_range) - 1
    grouped = weight.reshape(rows, -1, group or columns)
    values = np.clip(np.rint(grouped / scales.reshape(rows, -1, 1)), -limit, limit).astype(np.int8)
    return QuantizedWeight(values.reshape(rows, columns), scales, bits, group)


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
