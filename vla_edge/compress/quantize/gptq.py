"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): weights are rounded one input after the other, and those not yet
rounded make up for the error at the layer's output.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vla_edge.compress.quantize.formats import Format
from vla_edge.compress.quantize.rtn import grid_steps
from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.compress.statistics import MomentByRows

BLOCK, SMALL = 128, 16
"""Inputs whose corrections are applied to the rest, and to the rest of their block, in one product."""
PANEL = 1024  # rows of a triangular matrix that are multiplied at once


def gptq(
    weight: np.ndarray,
    second_moment: np.ndarray | MomentByRows,
    grid: Format,
    group: int | None,
    steps: np.ndarray | None = None,
    damping: float = 0.01,
    activation_order: bool = True,
    keep: np.ndarray | None = None,
    factor: OrderedFactor | None = None,
) -> QuantizedWeight:
    """Symmetric quantization of (out, in) weights.

    Args:
        second_moment: (in, in) E[x x^T], half the Hessian of the squared output error; an array, or by rows.
        group: inputs per scale; must divide them. None for the whole channel.
        steps: of the grid; those of round to nearest when None. They are fixed beforehand, so that the order of
            rounding leaves the groups where they are.
        damping: share of the mean of the diagonal that is added to it.
        keep: (out, in) bool; where False a weight was pruned and stays 0.
        activation_order: begin with the inputs of largest energy, whose errors most others can make up for.
        factor: `ordered_factor` of the three, where several layers share it; `second_moment` is not looked at then.
    """
    import torch

    rows, columns = weight.shape
    order, factor = ordered_factor(second_moment, damping, activation_order) if factor is None else factor
    scales, whole = grid.store_steps(grid_steps(weight, grid, group) if steps is None else steps)
    steps = torch.from_numpy((scales.astype(np.float32).reshape(rows, -1) * np.float32(whole)).T.copy())
    steps_of = (order // (group or columns)).tolist()
    # (in, out), a row is one input's weights; those before the one whose turn it is are rounded
    left = torch.from_numpy(np.array(weight.T, np.float32, order="C"))[order]
    stays = None if keep is None else torch.from_numpy(np.array(keep.T, order="C"))[order]
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors, lead = torch.empty(end - begin, rows), factor[begin:end].float()
        for small in range(begin, end, SMALL):
            last = min(small + SMALL, end)
            for i in range(small, last):
                own, step = lead[i - begin], steps[steps_of[i]]
                rounded = grid.nearest_tensor(left[i] / step)
                if stays is not None:
                    rounded.mul_(stays[i])
                errors[i - begin] = (left[i] - rounded * step) / own[i]
                left[i] = rounded
                left[i + 1 : last] -= own[i + 1 : last, None] * errors[i - begin]
            inside = slice(small - begin, last - begin)
            left[last:end] -= lead[inside, last:end].T @ errors[inside]
        left[end:] -= lead[:, end:].T @ errors
    values = torch.empty(rows, columns)
    values.T[order] = left
    return QuantizedWeight(values.numpy(), scales, grid.name, group, whole)


class OrderedFactor(NamedTuple):
    """Inputs in the order of rounding, and `inverse_factor` in that order."""

    order: object
    factor: object


def ordered_factor(second_moment: np.ndarray | MomentByRows, damping: float, activation_order: bool) -> OrderedFactor:
    """What layers that read the same inputs share of `gptq`; the arguments are its."""
    import torch

    energy = torch.from_numpy(np.array(second_moment.diagonal(), np.float32))
    order = torch.argsort(energy, descending=True, stable=True) if activation_order else torch.arange(len(energy))
    return OrderedFactor(order, inverse_factor(second_moment, damping, order))


def inverse_factor(moment: np.ndarray | MomentByRows, damping: float, order=None):
    """Upper Cholesky factor U of the inverse of (in, in) `moment`, U^T U, in float64, made in one matrix. Silent inputs get
    the mean of the diagonal; damping is raised until the matrix is positive definite.

    With the inputs the other way round, the inverse of the lower factor L of the moment is U: L L^T turned round has
    (L^-1)^T L^-1 turned round as its inverse. The inverse of the moment itself is never made.

    Args:
        order: of the inputs; as they are when None.
    """
    import torch

    columns = len(moment)
    turned = torch.arange(columns).flip(0) if order is None else order.flip(0)
    energy = torch.from_numpy(np.array(moment.diagonal(), np.float32))[turned].double()
    mean, silent = energy.mean().clamp_min(1e-30), energy <= 0
    # one input's products lie side by side, as LAPACK wants them: nothing is copied, and all is symmetric
    factor, failed = torch.empty(columns, columns, dtype=torch.float64).T, torch.empty((), dtype=torch.int32)
    while True:
        for begin in range(0, columns, BLOCK):
            some = torch.from_numpy(np.asarray(moment[turned[begin : begin + BLOCK].numpy()], np.float32))
            factor[:, begin : begin + BLOCK] = some[:, turned].T
        factor.diagonal()[silent] = mean
        factor.diagonal().add_(damping * mean)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            _invert_lower_(factor)
            return _turn_round_(factor)
        damping = max(10 * damping, 1e-6)


def _invert_lower_(matrix) -> None:
    """The inverse of a lower triangular matrix, in its place: a block of columns at a time, from the last on."""
    import torch

    size = len(matrix)
    for begin in range((size - 1) // BLOCK * BLOCK, -1, -BLOCK):
        end = min(begin + BLOCK, size)
        one = torch.eye(end - begin, dtype=matrix.dtype)
        matrix[begin:end, begin:end] = torch.linalg.solve_triangular(matrix[begin:end, begin:end].tril(), one, upper=False)
        below = matrix[end:, begin:end] @ matrix[begin:end, begin:end]
        for row in range(end, size, PANEL):  # what is right of the diagonal is 0 and is left out
            last = min(row + PANEL, size)
            matrix[row:last, begin:end] = -(matrix[row:last, end:last] @ below[: last - end])


def _turn_round_(matrix):
    """Rows and columns of a square matrix from the last to the first, in its place."""
    for begin in range(0, (len(matrix) + 1) // 2, BLOCK):
        end = min(begin + BLOCK, (len(matrix) + 1) // 2)
        upper = matrix[begin:end].clone()
        low, high = len(matrix) - end, len(matrix) - begin
        lower = matrix[low:high].clone()
        matrix[low:high] = upper.flip(0).flip(1)
        matrix[begin:end] = lower.flip(0).flip(1)
    return matrix
