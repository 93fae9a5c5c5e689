"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): weights are rounded one input after the other, and those not yet
rounded make up for the error at the layer's output.

The paper takes a factor of the inverse of the inputs' moment and spreads each error over the inputs that follow. Here each
input gathers what those before left, with a factor of the moment itself: the same numbers, as the nearest plane of a lattice
(Chen et al., 2025, arXiv:2507.18553), and nothing is inverted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vla_edge.compress.quantize.formats import Format
from vla_edge.compress.quantize.rtn import grid_steps
from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.compress.statistics import MomentByRows

BLOCK, SMALL = 128, 16
"""Inputs that gather the errors of all before them, and of those of their block, in one product."""


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
    if factor is None:
        factor = ordered_factor(second_moment, damping, activation_order)
    scales, whole = grid.store_steps(grid_steps(weight, grid, group) if steps is None else steps)
    steps = torch.from_numpy((scales.astype(np.float32).reshape(rows, -1) * np.float32(whole)).T.copy())
    steps_of = (factor.order // (group or columns)).tolist()
    # (in, out), a row is one input's weights, and once they are rounded their errors
    errors = torch.from_numpy(np.asarray(weight, np.float32)).T.contiguous()[factor.order]
    stays = None if keep is None else torch.from_numpy(np.array(keep.T, order="C"))[factor.order]
    values = torch.empty(rows, columns)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        gathers = factor.gathers(begin, end)
        wanted = torch.addmm(errors[begin:end], gathers[:, :begin], errors[:begin])
        rounded = torch.empty_like(wanted)
        for small in range(begin, end, SMALL):
            last = min(small + SMALL, end)
            some = slice(small - begin, last - begin)
            wanted[some].addmm_(gathers[some, begin:small], errors[begin:small])
            for i in range(small, last):
                row = i - begin
                wanted[row].addmv_(errors[small:i].T, gathers[row, small:i])
                step = steps[steps_of[i]]
                grid.nearest_(torch.div(wanted[row], step, out=rounded[row]))
                if stays is not None:
                    rounded[row] *= stays[i]
                errors[i].addcmul_(rounded[row], step, value=-1)
        values[:, factor.order[begin:end]] = rounded.T
    return QuantizedWeight(values.numpy(), scales, grid.name, group, whole)


class OrderedFactor(NamedTuple):
    """Inputs in the order of rounding, and the lower Cholesky factor of their moment the other way round, of which the first
    input is last."""

    order: object
    lower: object

    def gathers(self, begin: int, end: int):
        """(end - begin, end) float32, in the order of rounding: how much of each error before it an input takes over, so
        that the output errs least."""
        last = len(self.lower)
        rows = self.lower[last - end :, last - end : last - begin].flip(0, 1).T
        return (rows / self.diagonal(begin, end)[:, None]).float()

    def diagonal(self, begin: int, end: int):
        """(end - begin,) float64: how much an error of each input errs at the output that none after it can make up for."""
        last = len(self.lower)
        return self.lower.diagonal()[last - end : last - begin].flip(0)


def ordered_factor(second_moment: np.ndarray | MomentByRows, damping: float, activation_order: bool) -> OrderedFactor:
    """What layers that read the same inputs share of `gptq`; the arguments are its. In float64, made in one matrix.

    Silent inputs get the mean of the diagonal; damping is raised until the matrix is positive definite.
    """
    import torch

    columns = len(second_moment)
    energy = torch.from_numpy(np.array(second_moment.diagonal(), np.float32))
    order = torch.argsort(energy, descending=True, stable=True) if activation_order else torch.arange(columns)
    turned = order.flip(0)
    energy = energy[turned].double()
    mean, silent = energy.mean().clamp_min(1e-30), energy <= 0
    # one input's products lie side by side, as LAPACK wants them: nothing is copied, and all is symmetric
    lower, failed = torch.empty(columns, columns, dtype=torch.float64).T, torch.empty((), dtype=torch.int32)
    while True:
        for begin in range(0, columns, BLOCK):
            some = torch.from_numpy(np.asarray(second_moment[turned[begin : begin + BLOCK].numpy()], np.float32))
            lower[:, begin : begin + BLOCK] = some[:, turned].T
        lower.diagonal()[silent] = mean
        lower.diagonal().add_(damping * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            return OrderedFactor(order, lower)
        damping = max(10 * damping, 1e-6)
