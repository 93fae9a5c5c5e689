"""Tucker-2 of a convolution's kernel: fewer channels between its inputs, its taps and its outputs (Kim et al., 2016,
arXiv:1511.06530).

It begins with the truncated higher-order SVD and is refined by orthogonal iteration (HOSVD and HOOI, De Lathauwer et al.,
2000, doi:10.1137/S0895479896305696 and doi:10.1137/S0895479898346995).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_SWEEPS, _GAIN = 50, 1e-7


def tucker2(kernel: np.ndarray, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases (C, inputs) and (O, outputs) of the channels in which a kernel (O, S, C) keeps most of its energy."""
    kernel = np.asarray(kernel, np.float64)
    total, kept = float(np.square(kernel).sum()), 0.0
    into, out = _leading(kernel, 2, inputs), _leading(kernel, 0, outputs)
    for _ in range(_SWEEPS):
        out = _leading(kernel @ into, 0, outputs)
        thin = np.tensordot(out, kernel, (0, 0))
        into = _leading(thin, 2, inputs)
        before, kept = kept, float(np.square(thin @ into).sum())
        if kept - before <= _GAIN * total:
            break
    return into, out


def kept_energy(kernel: np.ndarray) -> np.ndarray:
    """(C, O) share of a kernel's (O, S, C) energy that its truncated HOSVD keeps with so many channels, from one up."""
    kernel = np.asarray(kernel, np.float64)
    core = np.tensordot(_leading(kernel, 0), kernel @ _leading(kernel, 2), (0, 0))
    energy = np.square(core).sum(1).T.cumsum(0).cumsum(1)
    return energy / max(float(energy[-1, -1]), 1e-300)


def cheapest_ranks(kept: np.ndarray, energy: float, cost: Callable) -> tuple[int, int]:
    """Of all (inputs, outputs) with which `kept_energy` reaches `energy`, those that cost least.

    Args:
        cost: of arrays of both, which broadcast.
    """
    inputs, outputs = np.arange(1, kept.shape[0] + 1)[:, None], np.arange(1, kept.shape[1] + 1)
    costs = np.where(kept >= min(energy, 1.0) - 1e-12, cost(inputs, outputs), np.inf)
    place = np.unravel_index(int(np.argmin(costs)), costs.shape)
    return int(place[0]) + 1, int(place[1]) + 1


def _leading(tensor: np.ndarray, axis: int, count: int | None = None) -> np.ndarray:
    """The first `count` left singular vectors of the unfolding along `axis`, all of them without."""
    rows = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    vectors = np.linalg.eigh(rows @ rows.T)[1][:, ::-1]
    return vectors[:, :count]
