"""Canonical polyadic decomposition of a convolution's kernel: a sum of products of one vector for each dimension (Lebedev et
al., 2015, arXiv:1412.6553), by alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SWEEPS, GAIN = 200, 1e-5
_RIDGE = 1e-10  # of the mean square, so that components that have become alike do not grow without bound
_SILENCE = 1e-30


def canonical(
    kernel: np.ndarray, rank: int, sweeps: int = SWEEPS, gain: float = GAIN, seed: int = 0
) -> tuple[list[np.ndarray], float]:
    """Factors (n, rank) of each dimension of a kernel (O, *taps, C), and the share of its energy that they miss.

    Begun with the leading singular vectors of each dimension, and with random ones where there are not so many.

    Args:
        sweeps: over all dimensions, at most; it ends when one mends less than `gain` of the error that is left.
        seed: of the random vectors: the same gives the same.
    """
    kernel = np.asarray(kernel, np.float64)
    total = float(np.square(kernel).sum()) or 1.0
    factors = [_beginning(kernel, axis, rank, np.random.default_rng([seed, axis])) for axis in range(kernel.ndim)]
    grams = [factor.T @ factor for factor in factors]
    unfolded, taps, missed = kernel.reshape(len(kernel), -1), range(1, kernel.ndim - 1), 1.0

    def update(axis: int, projected: np.ndarray) -> float:
        """Least squares of one factor given the others; returns the energy missed."""
        others = math.prod(grams[:axis] + grams[axis + 1 :])
        ridge = _RIDGE * max(np.trace(others) / rank, _SILENCE) * np.eye(rank)
        found = np.linalg.solve(others + ridge, projected.T).T
        inner, square = float((found * projected).sum()), float((others * (found.T @ found)).sum())
        if axis:  # the first carries the scale of all
            found = found / np.maximum(np.linalg.norm(found, axis=0), 1e-300)
        factors[axis], grams[axis] = found, found.T @ found
        return max(total - 2 * inner + square, 0.0) / total

    for _ in range(sweeps):
        before = missed
        missed = update(0, unfolded @ khatri_rao(factors[1:]))
        thin = (factors[0].T @ unfolded).reshape(rank, -1, kernel.shape[-1])
        update(kernel.ndim - 1, np.einsum("rsc,sr->cr", thin, khatri_rao(factors[1:-1]), optimize=True))
        taken = np.einsum("rsc,cr->rs", thin, factors[-1]).reshape(rank, *kernel.shape[1:-1])
        for axis in taps:
            rest = [other for other in taps if other != axis]
            weights = khatri_rao([factors[other] for other in rest]) if rest else np.ones((1, rank))
            along = np.moveaxis(taken, axis, 1).reshape(rank, kernel.shape[axis], -1)
            update(axis, np.einsum("rks,sr->kr", along, weights))
        if before - missed <= gain * missed:
            break
    # the scale that normalizing took from the others
    missed = update(0, unfolded @ khatri_rao(factors[1:]))
    return factors, missed


def khatri_rao(factors: Sequence[np.ndarray]) -> np.ndarray:
    """(n, R) each -> (product of all n, R), the last dimension inside."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).reshape(-1, factor.shape[1])
    return product


def _beginning(kernel: np.ndarray, axis: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    rows = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    vectors = np.linalg.eigh(rows @ rows.T)[1][:, ::-1][:, :rank]
    more = rng.standard_normal((len(rows), rank - vectors.shape[1]))
    return np.concatenate([vectors, more / np.maximum(np.linalg.norm(more, axis=0), 1e-300)], axis=1)
