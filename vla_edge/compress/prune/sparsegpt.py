"""SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774): weights are removed one input after the other, and those that
stay and are yet to come make up for the error at the layer's output.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.prune.masks import FOUR, keep_largest
from vla_edge.compress.quantize.gptq import BLOCK, inverse_factor
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
    factor = inverse_factor(second_moment, damping)
    left = torch.from_numpy(np.array(weight.T, np.float32, order="C"))  # (in, out): a row is one input's weights
    scale = factor.diagonal().float()[:, None]
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors, lead = torch.zeros(end - begin, rows), factor[begin:end].float()
        if not two_of_four:
            score = (left[begin:end] / scale[begin:end]).square()
            keep = torch.from_numpy(keep_largest(score.numpy().reshape(1, -1), sparsity, False, by_row=False))
            keep = keep.reshape(end - begin, rows)
        for i in range(begin, end):
            if two_of_four and i % FOUR == 0:
                # the choice is made when its four come up, with all corrections of those before
                score = (left[i : i + FOUR] / scale[i : i + FOUR]).square()
                four = torch.from_numpy(keep_largest(score.T.contiguous().numpy(), 0.5, True, by_row=True)).T
            stays = four[i % FOUR] if two_of_four else keep[i - begin]
            own = lead[i - begin]
            errors[i - begin] = torch.where(stays, 0.0, left[i] / own[i])
            left[i] = torch.where(stays, left[i], 0.0)
            left[i + 1 : end] -= own[i + 1 : end, None] * errors[i - begin]
        left[end:] -= lead[:, end:].T @ errors
    return left.T.contiguous().numpy()
