"""What reaches a layer, streamed: as much as AWQ, GPTQ, SmoothQuant and bias correction ask of calibration data.

All of them minimize the error of a layer's output over the data, and the mean of |dW x|^2 is tr(dW C dW^T) with the
second moment C = E[x x^T]: one matrix for each input stands for every activation there was.
"""

from __future__ import annotations

import numpy as np


class InputStatistics:
    """Moments of the vectors that reach a layer, in memory that does not grow with the data.

    Attributes:
        count: vectors seen.
        largest: (in,) largest magnitude of each channel.
    """

    def __init__(self):
        self.count = 0
        self.largest = self._sum = self._magnitude = self._products = None

    def update(self, values: np.ndarray) -> None:
        """Count vectors (..., in).

        Raises:
            ValueError: a value is not finite.
        """
        rows = np.asarray(values, np.float32).reshape(-1, np.shape(values)[-1])
        if not len(rows):
            return
        if not np.isfinite(rows).all():
            raise ValueError("values that are not finite")
        if self.largest is None:
            width = rows.shape[1]
            self.largest, self._products = np.zeros(width, np.float32), np.zeros((width, width), np.float32)
            self._sum, self._magnitude = np.zeros(width), np.zeros(width)
        magnitudes = np.abs(rows)
        self.count += len(rows)
        self.largest = np.maximum(self.largest, magnitudes.max(0))
        self._sum += rows.sum(0)
        self._magnitude += magnitudes.sum(0)
        self._products += rows.T @ rows

    @property
    def mean(self) -> np.ndarray:
        """(in,) E[x]."""
        return (self._sum / self.count).astype(np.float32)

    @property
    def mean_magnitude(self) -> np.ndarray:
        """(in,) E[|x|]."""
        return (self._magnitude / self.count).astype(np.float32)

    @property
    def second_moment(self) -> np.ndarray:
        """(in, in) E[x x^T]."""
        return self._products / np.float32(self.count)

    def scaled(self, factor: np.ndarray) -> InputStatistics:
        """As if every vector had been multiplied by `factor` (in,)."""
        factor = np.asarray(factor, np.float32)
        other = InputStatistics()
        other.count, other.largest = self.count, self.largest * np.abs(factor)
        other._sum, other._magnitude = self._sum * factor, self._magnitude * np.abs(factor)
        other._products = self._products * np.outer(factor, factor)
        return other


def output_error(difference: np.ndarray, second_moment: np.ndarray) -> float:
    """Mean square of what a change of weights (out, in) does to a layer's output, summed over the outputs."""
    return float(np.einsum("oi,oi->", difference @ second_moment, difference))
