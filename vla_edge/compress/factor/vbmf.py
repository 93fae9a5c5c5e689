"""How many components of a matrix are signal: empirical variational Bayesian matrix factorization, whose solution is known
in closed form but for the variance of the noise (Nakajima et al., 2013, Journal of Machine Learning Research 14, theorems
2 and 3; of convolutions' unfoldings, Kim et al., 2016, arXiv:1511.06530)."""

from __future__ import annotations

import numpy as np


def signal_rank(matrix: np.ndarray) -> int:
    """Number of components of a matrix that noise of the same variance everywhere does not explain; 0 to the shorter
    side."""
    rows, columns = sorted(matrix.shape)
    squares = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    if not squares[0]:
        return 0
    ratio = rows / columns
    # by which a component's square has to exceed what noise gives each column
    least = 2.5129 * np.sqrt(ratio)
    threshold = (1 + least) * (1 + ratio / least)
    variance = _noise(squares, rows, columns, threshold)
    return int((squares > columns * variance * threshold).sum())


def _noise(squares: np.ndarray, rows: int, columns: int, threshold: float) -> float:
    """Variance of the noise with the least free energy."""
    from scipy.optimize import minimize_scalar

    ratio = rows / columns
    most_components = min(int(np.ceil(rows / (1 + ratio))) - 1, rows - 1)
    highest = squares.sum() / (rows * columns)
    lowest = max(squares[most_components] / (columns * threshold), squares[most_components:].mean() / columns)
    lowest = max(lowest, 1e-12 * highest)

    def free_energy(logarithm: float) -> float:
        x = np.maximum(squares / (columns * np.exp(logarithm)), 1e-300)
        signal = x[x > threshold]
        excess = signal - (1 + ratio)
        tau = (excess + np.sqrt(np.maximum(excess**2 - 4 * ratio, 0))) / 2
        gained = np.log(tau + 1) + ratio * np.log(tau / ratio + 1) - tau
        return float((x - np.log(x)).sum() + gained.sum())

    if lowest >= highest:
        return float(highest)
    # it has many minima: the best of a grid is refined
    grid = np.linspace(np.log(lowest), np.log(highest), 200)
    place = int(np.argmin([free_energy(point) for point in grid]))
    bounds = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    return float(np.exp(minimize_scalar(free_energy, bounds=bounds, method="bounded").x))
