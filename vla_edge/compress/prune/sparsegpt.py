"""SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774): weights are removed one input after the other, and those that
stay and are yet to come make up for the error at the layer's output.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.prune.masks import FOUR, keep_largest
from vla_edge.compress.quantize.gptq import BLOCK, ordered_factor
from vla_edge.compress.statistics import MomentByRows


def sparsegpt(
    weight: np.ndarray,
    second_moment: np.ndarray | MomentByRows,
    sparsity: float,
    two_of_four: bool = False,
    damping: float = 0.01,
) -> np.ndarray:
    """(out, in) float32 weights with zeros.

    Args:
        second_moment: (in, in) E[x x^T], half the Hessian of the squared output error; an array, or by rows.
        damping: share of the mean of the diagonal that is added to it.

    Raises:
        ValueError: 2:4, and four does not divide the inputs.
    """
    import torch

    rows, columns = weight.shape
    if two_of_four and columns % FOUR:
        raise ValueError(f"2:4 needs inputs in fours, and there are {columns}")
    factor = ordered_factor(second_moment, damping, False)
    # (in, out), a row is one input's weights, and once it was its turn how far they moved
    errors = torch.from_numpy(np.array(weight.T, np.float32, order="C"))
    kept = torch.empty(columns, rows)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        gathers, scale = factor.gathers(begin, end), factor.diagonal(begin, end).float()[:, None]
        gathered, own, weights = gathers[:, :begin] @ errors[:begin], gathers[:, begin:], errors[begin:end]
        if not two_of_four:
            cost = _cost(weights, gathered, own, scale).numpy().reshape(1, -1)
            keep = torch.from_numpy(keep_largest(cost, sparsity, False, by_row=False)).reshape(end - begin, rows)
        for row in range(end - begin):
            if two_of_four and row % FOUR == 0:  # the choice is made when its four come up
                some = slice(row, row + FOUR)
                so_far = torch.addmm(gathered[some], own[some, :row], weights[:row])
                cost = _cost(weights[some], so_far, own[some, some], scale[some])
                four = torch.from_numpy(keep_largest(cost.T.contiguous().numpy(), 0.5, True, by_row=True)).T
            value = torch.addmv(gathered[row], weights[:row].T, own[row, :row]).add_(weights[row])
            value *= four[row % FOUR] if two_of_four else keep[row]
            weights[row] -= value
            kept[begin + row] = value
    return kept.T.contiguous().numpy()


def _cost(weights, gathered, own, scale):
    """(inputs, outs) what removing a weight adds to the output's error, when all of these have made up for those before."""
    import torch

    made_up = torch.linalg.solve_triangular(own, gathered, upper=False, unitriangular=True)
    return (made_up.add_(weights) * scale).square_()
