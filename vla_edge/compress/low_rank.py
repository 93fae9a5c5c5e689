"""Products through fewer channels: a layer's best factors for the inputs it really gets, and the branch of SVDQuant.

The truncated SVD of W C^(1/2) leaves the least error at the layer's output over data with second moment C (the
whitening of SVD-LLM, Wang et al., 2024, arXiv:2403.07378); without data, the SVD of W the least error of the weights.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.quantize.weights import LowRank

DAMPING = 1e-4


def factorize(
    weight: np.ndarray,
    rank: int | None = None,
    energy: float | None = None,
    second_moment: np.ndarray | None = None,
    dtype: str = "float32",
) -> LowRank:
    """Factors of (out, in) weights.

    Args:
        rank: of the factors, at most that of the matrix. energy: share of the squared singular values to keep, where no
            rank is given.
        second_moment: (in, in) E[x x^T] of what reaches the layer.
        dtype: the factors are stored in.
    """
    root = inverse = np.eye(weight.shape[1])
    if second_moment is not None:
        root, inverse = roots(second_moment)
    left, values, right = np.linalg.svd(weight.astype(np.float64) @ root, full_matrices=False)
    if rank is None:
        kept = np.cumsum(values**2) / max(float((values**2).sum()), 1e-30)
        rank = int(np.searchsorted(kept, energy - 1e-12)) + 1
    rank = max(1, min(rank, len(values)))
    share = np.sqrt(values[:rank])
    return LowRank((share[:, None] * (right[:rank] @ inverse)).astype(dtype), (left[:, :rank] * share).astype(dtype))


def saves(shape: tuple[int, int], rank: int) -> bool:
    """Whether factors of that rank are fewer numbers, and so fewer products, than the (out, in) matrix."""
    return rank * sum(shape) < shape[0] * shape[1]


def roots(second_moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square root of a second moment C, a little damped, and its inverse."""
    moment = np.asarray(second_moment, np.float64)
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    values = np.sqrt(np.maximum(values, 0) + DAMPING * max(float(values.mean()), 1e-30))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
