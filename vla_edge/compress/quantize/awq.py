"""AWQ (Lin et al., 2023, arXiv:2306.00978): the few weights that large activations meet are protected by scaling their
channels up before rounding; then each group of weights is clipped where that costs its output least.

Both searches measure the error of the layer's output over the calibration data, exactly, through its second moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vla_edge.compress.quantize.formats import Format
from vla_edge.compress.quantize.rtn import grid_steps, round_on_grid
from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.compress.statistics import InputStatistics, output_error

RATIOS = tuple(np.linspace(0.0, 1.0, 21))
SHRINKS = tuple(np.linspace(1.0, 0.5, 21))


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
    best = np.inf, np.ones_like(activity)
    for ratio in RATIOS:
        for scale in (activity**ratio, activity**ratio / size ** (1 - ratio)):
            scale = np.float32(scale / np.sqrt(scale.max() * scale.min()))
            error = 0.0
            for weight, quantize in zip(weights, quantizers):
                error += output_error(quantize(weight * scale).dequantize() / scale - weight, moment)
            if error < best[0]:
                best = error, scale
    return best[1]


def clipped_steps(weight: np.ndarray, second_moment: np.ndarray, grid: Format, group: int | None) -> np.ndarray:
    """Steps of the grid, (out,) or (out, groups), each shrunk to where its own group errs least at the output.

    Args:
        group: inputs per scale; must divide them. None for the whole channel.
    """
    rows, columns = weight.shape
    width = group or columns
    groups = columns // width
    blocks = np.stack([second_moment[i : i + width, i : i + width] for i in range(0, columns, width)])
    whole = grid_steps(weight, grid, group)
    best, found = np.full((rows, groups), np.inf), whole.reshape(rows, groups).copy()
    for shrink in SHRINKS:
        steps = whole * np.float32(shrink)
        difference = round_on_grid(weight, steps, grid, group).dequantize() - weight
        split = difference.reshape(rows, groups, width).transpose(1, 0, 2)
        error = ((split @ blocks) * split).sum(-1).T
        better = error < best
        best[better], found[better] = error[better], steps.reshape(rows, groups)[better]
    return found.reshape(whole.shape)
