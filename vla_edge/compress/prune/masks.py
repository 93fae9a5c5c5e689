"""Which weights of a layer go: by magnitude, or by Wanda (Sun et al., 2023, arXiv:2306.11695).

A pattern is a share of the weights, or "2:4": two of every four neighbouring inputs stay, which is what sparse tensor
cores multiply.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.statistics import InputStatistics

FOUR, TWO = 4, 2


def magnitude_mask(weight: np.ndarray, sparsity: float, two_of_four: bool = False) -> np.ndarray:
    """(out, in) bool, True where a weight stays: the largest of the whole matrix, or of each four."""
    return keep_largest(np.abs(weight), sparsity, two_of_four, by_row=False)


def wanda_mask(
    weight: np.ndarray, statistics: InputStatistics, sparsity: float, two_of_four: bool = False
) -> np.ndarray:
    """(out, in) bool: what stays has the largest |w| times norm of its input, compared within each output."""
    return keep_largest(np.abs(weight) * np.sqrt(statistics.energy), sparsity, two_of_four, by_row=True)


def keep_largest(score: np.ndarray, sparsity: float, two_of_four: bool, by_row: bool) -> np.ndarray:
    """(out, in) bool, exactly `sparsity` of it False (to the next whole weight), or exactly two of every four.

    Raises:
        ValueError: four does not divide the inputs.
    """
    rows, columns = score.shape
    if two_of_four:
        if columns % FOUR:
            raise ValueError(f"2:4 needs inputs in fours, and there are {columns}")
        fours = score.reshape(-1, FOUR)
        return _drop(fours, TWO).reshape(rows, columns)
    if by_row:
        return _drop(score, round(sparsity * columns))
    return _drop(score.reshape(1, -1), round(sparsity * score.size)).reshape(rows, columns)


def _drop(score: np.ndarray, count: int) -> np.ndarray:
    """False for the `count` smallest of each row; of equal ones the first go."""
    keep = np.ones(score.shape, bool)
    if count:
        lowest = np.argsort(score, axis=1, kind="stable")[:, :count]
        np.put_along_axis(keep, lowest, False, axis=1)
    return keep
