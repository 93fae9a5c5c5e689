"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): weights are rounded one input after the other, and those not yet
rounded make up for the error at the layer's output.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.quantize.formats import Format
from vla_edge.compress.quantize.rtn import grid_steps
from vla_edge.compress.quantize.weights import QuantizedWeight

BLOCK = 128
"""Inputs whose corrections are applied to the rest in one product."""


def gptq(
    weight: np.ndarray,
    second_moment: np.ndarray,
    grid: Format,
    group: int | None,
    steps: np.ndarray | None = None,
    damping: float = 0.01,
    activation_order: bool = True,
    keep: np.ndarray | None = None,
) -> QuantizedWeight:
    """Symmetric quantization of (out, in) weights.

    Args:
        second_moment: (in, in) E[x x^T], half the Hessian of the squared output error.
        group: inputs per scale; must divide them. None for the whole channel.
        steps: of the grid; those of round to nearest when None. They are fixed beforehand, so that the order of
            rounding leaves the groups where they are.
        damping: share of the mean of the diagonal that is added to it.
        keep: (out, in) bool; where False a weight was pruned and stays 0.
        activation_order: begin with the inputs of largest energy, whose errors most others can make up for.
    """
    import torch

    rows, columns = weight.shape
    scales, whole = grid.store_steps(grid_steps(weight, grid, group) if steps is None else steps)
    seen = scales.astype(np.float32).reshape(rows, -1) * np.float32(whole)
    steps = torch.from_numpy(np.repeat(seen, group or columns, axis=1).T.copy())
    left = torch.from_numpy(np.array(weight.T, np.float32, order="C"))  # (in, out): a row is one input's weights
    moment = torch.from_numpy(np.asarray(second_moment, np.float32))
    energy = moment.diagonal()
    order = torch.argsort(energy, descending=True, stable=True) if activation_order else torch.arange(columns)
    factor = inverse_factor(moment, damping, order)
    left, steps = left[order], steps[order]
    stays = None if keep is None else torch.from_numpy(np.array(keep.T, order="C"))[order]
    values = torch.empty(columns, rows)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = torch.empty(end - begin, rows)
        for i in range(begin, end):
            rounded = torch.from_numpy(grid.nearest((left[i] / steps[i]).numpy()))
            values[i] = rounded if stays is None else rounded.mul_(stays[i])
            errors[i - begin] = (left[i] - rounded * steps[i]) / factor[i, i]
            left[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - begin]
        left[end:] -= factor[begin:end, end:].T @ errors
    restored = torch.empty_like(values)
    restored[order] = values
    return QuantizedWeight(restored.T.contiguous().numpy(), scales, grid.name, group, whole)


def inverse_factor(moment, damping: float, order=None):
    """Upper Cholesky factor of the inverse of (in, in) `moment`, float32, computed in float64 with two matrices at a time
    in memory. Silent inputs get the mean of the diagonal; damping is raised until the matrix is positive definite.

    Args:
        order: of the inputs; as they are when None.
    """
    import torch

    moment = moment if order is None else moment[order].T[order]  # symmetric
    energy = moment.diagonal().double()
    mean, silent = energy.mean().clamp_min(1e-30), energy <= 0
    while True:
        factor = moment.double()
        factor.diagonal()[silent] = mean
        factor.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(factor)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return factor.float()
        damping = max(10 * damping, 1e-6)
