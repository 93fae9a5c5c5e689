"""AWQ (Lin et al., 2023, arXiv:2306.00978): the few weights that large activations meet are protected by scaling their
channels up before rounding; then each group of weights is clipped where that costs its output least.

Both searches measure the error of the layer's output over the calibration data through its second moment: exactly, or
as well as products in bfloat16 tell errors apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from vla_edge.compress.quantize.formats import Format
from vla_edge.compress.quantize.rtn import grid_steps
from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.compress.statistics import InputStatistics, MomentByRows, output_error, rounded_output_error

RATIOS = tuple(np.linspace(0.0, 1.0, 21))
MOST_ROWS, LEAST_ROWS, PRODUCTS = 512, 128, 2**32
"""Outputs of a layer, evenly spread, that stand for all in the search of scales, each for its inputs' products: every output
errs by itself, so that this many tell the sum to a few percent, and they are the same for every scale that is tried."""
SHRINKS = tuple(np.linspace(1.0, 0.5, 21))
SEARCHED = 1 << 19  # weights that are shrunk together: many enough for products, few enough for a cache


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
    measure = rounded_output_error(moment) if statistics.bfloat16 else partial(output_error, second_moment=moment)
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
                error += stride * measure(quantize(weight * scale).dequantize() / scale - weight)
            if error < best[0]:
                best = error, scale
    return best[1]


def clipped_steps(
    weight: np.ndarray, second_moment: np.ndarray | MomentByRows, grid: Format, group: int | None
) -> np.ndarray:
    """Steps of the grid, (out,) or (out, groups), each shrunk to where its own group errs least at the output.

    A whole channel's error takes a product with all of the second moment. Rounding errors hardly go together, so that its
    diagonal alone tells nearly where to shrink to; no shrinking, that place and those beside it are then compared exactly.

    Args:
        group: inputs per scale; must divide them. None for the whole channel.
    """
    import torch

    columns = weight.shape[1]
    width = group or columns
    blocks = np.stack([second_moment[i : i + width][:, i : i + width] for i in range(0, columns, width)])
    blocks = torch.from_numpy(blocks)
    whole = grid_steps(weight, grid, group)
    tries = [whole * np.float32(shrink) for shrink in SHRINKS]
    if group is None:
        energy = blocks.diagonal(dim1=1, dim2=2)[..., None]
        near = _least_error(weight, tries, grid, lambda difference, _: (difference.square() @ energy)[..., 0])
        beside = whole * np.float32(SHRINKS[0] - SHRINKS[1])
        tries = [whole, near, np.maximum(near - beside, whole * np.float32(SHRINKS[-1])), np.minimum(near + beside, whole)]

    def error(difference, products):
        return torch.bmm(difference, blocks, out=products).mul_(difference).sum(-1)

    return _least_error(weight, tries, grid, error)


def _least_error(weight: np.ndarray, tries: Sequence[np.ndarray], grid: Format, error: Callable) -> np.ndarray:
    """Of steps that are tried, all in one shape, for each group those with the least error, the first of equals.

    Args:
        error: (groups, outs, inputs per scale) of rounded weights less themselves, a tensor, and one to work in
            -> (groups, outs).
    """
    import torch

    rows, columns = weight.shape
    groups, some = tries[0].size // rows, max(1, SEARCHED // columns)
    stored, found = [grid.store_steps(steps) for steps in tries], np.empty_like(tries[0])
    for begin in range(0, rows, some):
        place = slice(begin, begin + some)
        split = torch.from_numpy(weight[place]).view(-1, groups, columns // groups).transpose(0, 1).contiguous()
        difference, products = torch.empty_like(split), torch.empty_like(split)
        errors = torch.empty(len(tries), *split.shape[:2])
        for number, (scales, second) in enumerate(stored):
            seen = torch.from_numpy(scales[place].astype(np.float32) * np.float32(second)).view(-1, groups).T[..., None]
            grid.nearest_(torch.div(split, seen, out=difference)).mul_(seen).sub_(split)
            errors[number] = error(difference, products)
        least = errors.argmin(0).T.reshape(found[place].shape).numpy()
        found[place] = np.take_along_axis(np.stack([steps[place] for steps in tries]), least[None], 0)[0]
    return found
