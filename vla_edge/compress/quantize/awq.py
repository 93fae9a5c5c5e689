"""AWQ (Lin et al., 2023, arXiv:2306.00978): the few weights that large activations meet are protected by scaling their
channels up before rounding; then each group of weights is clipped where that costs its output least.

Both searches measure the error of the layer's output over the calibration data, exactly, through its second moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vla_edge.compress.quantize.formats import Format
from vla_edge.compress.quantize.rtn import CACHED, grid_steps
from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.compress.statistics import InputStatistics, MomentByRows, output_error

RATIOS = tuple(np.linspace(0.0, 1.0, 21))
MOST_ROWS, LEAST_ROWS, PRODUCTS = 512, 128, 2**32
"""Outputs of a layer, evenly spread, that stand for all in the search of scales, each for its inputs' products: every output
errs by itself, so that this many tell the sum to a few percent, and they are the same for every scale that is tried."""
SHRINKS = tuple(np.linspace(1.0, 0.5, 21))
PATIENCE = 6
"""Shrinks in a row that may fail to help before a channel is left alone: of 8 bits hardly any is clipped by much."""


def search_scale(
    statistics: InputStatistics,
    weights: Sequence[np.ndarray],
    quantizers: Sequence[Callable[[np.ndarray], QuantizedWeight]],
) -> np.ndarray:
    """(in,) by which to multiply the columns of the weights, and to divide what they read.

    Tries s = E|x|^r, as in the paper, and s = E|x|^r / E|w|^(1 - r), which also spares columns whose weights are small
    (the form of AutoAWQ), each over 21 values of r; no scaling is among them.

    Args:
        weights: (out, in) of every layer that reads the tensor. quantizers: how each will be rounded.
    """
    moment = statistics.second_moment
    activity = np.maximum(statistics.mean_magnitude, 1e-4 * statistics.mean_magnitude.max() + 1e-12)
    size = np.mean([np.mean(np.abs(w) / np.abs(w).max(1, keepdims=True).clip(1e-12), 0) for w in weights], axis=0)
    size = np.maximum(size, 1e-4)
    searched = int(np.clip(PRODUCTS // len(activity) ** 2, LEAST_ROWS, MOST_ROWS))
    strides = [-(-len(weight) // searched) for weight in weights]
    weights = [weight[::stride] for weight, stride in zip(weights, strides)]
    best = np.inf, np.ones_like(activity)
    for ratio in RATIOS:
        for scale in (activity**ratio, activity**ratio / size ** (1 - ratio)):
            scale = np.float32(scale / np.sqrt(scale.max() * scale.min()))
            error = 0.0
            for weight, stride, quantize in zip(weights, strides, quantizers):
                error += stride * output_error(quantize(weight * scale).dequantize() / scale - weight, moment)
            if error < best[0]:
                best = error, scale
    return best[1]


def clipped_steps(
    weight: np.ndarray, second_moment: np.ndarray | MomentByRows, grid: Format, group: int | None
) -> np.ndarray:
    """Steps of the grid, (out,) or (out, groups), each shrunk to where its own group errs least at the output.

    Args:
        group: inputs per scale; must divide them. None for the whole channel.
    """
    import torch

    rows, columns = weight.shape
    width = group or columns
    groups = columns // width
    blocks = np.stack([second_moment[i : i + width][:, i : i + width] for i in range(0, columns, width)])
    whole = grid_steps(weight, grid, group)
    best, found = np.full((rows, groups), np.inf), whole.reshape(rows, groups).copy()
    worse = np.zeros((rows, groups), np.int8)  # shrinks in a row that did not help
    blocks, weight = torch.from_numpy(blocks), torch.from_numpy(weight)
    some = max(1, CACHED // columns)
    for shrink in SHRINKS:
        steps = whole * np.float32(shrink)
        scales, second = grid.store_steps(steps)
        seen = (scales.astype(np.float32) * np.float32(second)).reshape(rows, groups, 1)
        steps, waiting = steps.reshape(rows, groups), np.flatnonzero((worse < PATIENCE).any(1))
        for begin in range(0, len(waiting), some):
            place = waiting[begin : begin + some]
            split, step = weight[place].view(-1, groups, width), torch.from_numpy(seen[place])
            difference = (_nearest(grid, split / step).mul_(step).sub_(split)).transpose(0, 1)
            error = (difference @ blocks).mul_(difference).sum(-1).T.numpy()
            better = error < best[place]
            best[place] = np.where(better, error, best[place])
            found[place] = np.where(better, steps[place], found[place])
            worse[place] = np.where(better, 0, worse[place] + 1)
    return found.reshape(whole.shape)


def _nearest(grid: Format, values):
    """`Format.nearest` of a tensor, with all of PyTorch's threads."""
    import torch

    if grid.is_integer:
        return values.round_().clamp_(grid.smallest, grid.largest)
    return torch.from_numpy(grid.nearest(values.numpy()))
