"""What reaches a layer, streamed: as much as AWQ, GPTQ, SmoothQuant and bias correction ask of calibration data.

All of them minimize the error of a layer's output over the data, and the mean of |dW x|^2 is tr(dW C dW^T) with the
second moment C = E[x x^T]: one matrix for each input stands for every activation there was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np

BLOCK = 256
"""Channels whose products with all later ones are computed together: the other half of the matrix is its mirror."""
TOGETHER = 1024
"""Vectors that are multiplied together: adding products of one token takes as long as of hundreds, the matrix being larger than
a processor's cache."""


class InputStatistics:
    """Moments of the vectors that reach a layer, in memory that does not grow with the data.

    Args:
        products: whether E[x x^T] is kept; without it memory grows with a layer's inputs and not with their square.
        bfloat16: it is made of products in bfloat16, which tells errors of a layer apart; equations that are solved
            with it need more.

    Attributes:
        count: vectors seen.
        low, high: (in,) smallest and largest value of each channel.
    """

    def __init__(self, products: bool = True, bfloat16: bool = False):
        self.bfloat16 = bfloat16
        self.count, self._weight = 0, 0.0
        self.low = self.high = self._sum = self._magnitude = self._squares = self._products = None
        self._keeps_products, self._factor = products, None
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # vectors and as they weigh, to be multiplied

    def update(self, values: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count vectors (..., in), in the products of channels by `weights` (...), all alike without.

        Raises:
            ValueError: a value is not finite, or these are `scaled` statistics, which share their products.
        """
        if self._factor is not None:
            raise ValueError("scaled statistics take nothing more")
        rows = np.asarray(values, np.float32).reshape(-1, np.shape(values)[-1])
        if not len(rows):
            return
        low, high = rows.min(0), rows.max(0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("values that are not finite")
        if self.low is None:
            width = rows.shape[1]
            self.low, self.high = low, high
            self._sum, self._magnitude, self._squares = np.zeros(width), np.zeros(width), np.zeros(width)
            if self._keeps_products:
                self._products = [
                    np.zeros((min(BLOCK, width - begin), width - begin), np.float32) for begin in range(0, width, BLOCK)
                ]
        self.count += len(rows)
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self._sum += rows.sum(0)
        self._magnitude += np.abs(rows).sum(0)
        self._squares += np.einsum("ni,ni->i", rows, rows)
        if self._keeps_products:
            kept = rows.copy()  # what they were read from may be written to
            weighed = kept if weights is None else kept * np.asarray(weights, np.float32).reshape(-1, 1)
            self._waiting.append((kept, weighed))
            self._weight += len(rows) if weights is None else float(np.sum(weights, dtype=np.float64))
            if sum(len(some) for some, _ in self._waiting) >= TOGETHER:
                self._multiply()

    def _multiply(self) -> None:
        """Adds the products of the vectors that wait."""
        if not self._waiting:
            return
        alike = all(rows is weighed for rows, weighed in self._waiting)
        rows = np.concatenate([rows for rows, _ in self._waiting])
        weighed = rows if alike else np.concatenate([weighed for _, weighed in self._waiting])
        self._waiting.clear()
        if self.bfloat16:
            rows, weighed = _in_bfloat16(rows), _in_bfloat16(weighed)
        for number, products in enumerate(self._products):
            begin = number * BLOCK
            made = rows[:, begin : begin + BLOCK].T @ weighed[:, begin:]
            products += made.float().numpy() if self.bfloat16 else made

    @property
    def largest(self) -> np.ndarray:
        """(in,) largest magnitude of each channel."""
        return np.maximum(-self.low, self.high)

    @property
    def mean(self) -> np.ndarray:
        """(in,) E[x]."""
        return (self._sum / self.count).astype(np.float32)

    @property
    def mean_magnitude(self) -> np.ndarray:
        """(in,) E[|x|]."""
        return (self._magnitude / self.count).astype(np.float32)

    @property
    def energy(self) -> np.ndarray:
        """(in,) E[x^2]."""
        return (self._squares / self.count).astype(np.float32)

    @property
    def moment_by_rows(self) -> MomentByRows:
        """E[x x^T], by weight; all zero where nothing had any."""
        if self._products is None:
            raise ValueError("these statistics were taken without products of channels")
        self._multiply()
        return MomentByRows(self._products, self._weight or 1.0, self._factor)

    @property
    def second_moment(self) -> np.ndarray:
        """(in, in) the same as a whole."""
        return self.moment_by_rows[:]

    def scaled(self, factor: np.ndarray) -> InputStatistics:
        """As if every vector had been multiplied by the positive `factor` (in,); costs no memory to speak of."""
        self._multiply()
        factor = np.asarray(factor, np.float32)
        other = copy.copy(self)
        other.low, other.high = self.low * factor, self.high * factor
        other._sum, other._magnitude = self._sum * factor, self._magnitude * factor
        other._squares = self._squares * np.square(factor, dtype=np.float64)
        other._factor = factor if self._factor is None else factor * self._factor
        return other


class MomentByRows:
    """A second moment (in, in) of which half is in memory: rows are made when they are asked for, as of an array.

    Args:
        products: sums of x x^T, of `BLOCK` channels with themselves and all later ones each. weight: of all vectors.
        factor: (in,) that the vectors are multiplied by, or None.
    """

    def __init__(self, products: Sequence[np.ndarray], weight: float, factor: np.ndarray | None):
        self._products, self._weight, self._factor = products, np.float32(weight), factor

    def __len__(self) -> int:
        return self._products[0].shape[1]

    def diagonal(self) -> np.ndarray:
        """(in,) E[x^2]."""
        diagonal = np.concatenate([products.diagonal() for products in self._products]) / self._weight
        return diagonal if self._factor is None else diagonal * self._factor * self._factor

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """(rows, in) float32, of a slice or of places."""
        rows = np.arange(len(self))[rows]
        moment = np.empty((len(rows), len(self)), np.float32)
        for number, products in enumerate(self._products):
            begin = number * BLOCK
            end = begin + len(products)
            own, later = np.flatnonzero((begin <= rows) & (rows < end)), np.flatnonzero(rows >= end)
            moment[own, begin:] = products[rows[own] - begin]
            moment[later, begin:end] = products[:, rows[later] - begin].T
        moment /= self._weight
        if self._factor is not None:
            moment *= self._factor[rows, None]
            moment *= self._factor
        return moment


def products_size(width: int) -> int:
    """Bytes that `InputStatistics` holds for the products of so many channels."""
    return sum(4 * min(BLOCK, width - begin) * (width - begin) for begin in range(0, width, BLOCK))


def output_error(difference: np.ndarray, second_moment: np.ndarray) -> float:
    """Mean square of what a change of weights (out, in) does to a layer's output, summed over the outputs."""
    return float(np.einsum("oi,oi->", difference @ second_moment, difference))


def rounded_output_error(second_moment: np.ndarray) -> Callable[[np.ndarray], float]:
    """`output_error` for that moment by a product in bfloat16, where the processor has those: sums over so many outputs
    and inputs tell two changes apart all the same."""
    import torch

    moment = _in_bfloat16(second_moment)

    def error(difference: np.ndarray) -> float:
        change = torch.from_numpy(difference)
        return float((change.bfloat16() @ moment).float().mul_(change).sum())

    return error


def _in_bfloat16(array: np.ndarray):
    import torch

    return torch.from_numpy(array).bfloat16()
