"""Activation ranges from streams of data: min-max, percentile and least-squares calibrators over one histogram."""

from __future__ import annotations

import numpy as np

from vla_edge.compress.quantize.formats import FP8
from vla_edge.compress.quantize.weights import ActivationQuant

BINS = 2048
CALIBRATORS = ("minmax", "tail", "percentile", "mse")
# How many times as many data as were seen a range of the calibrator "tail" is meant to hold for.
AHEAD = 10
_CLIPS = np.geomspace(0.02, 1.0, 120)


class RangeObserver:
    """Minimum, maximum and a histogram of everything seen, in memory that does not grow with the data.

    The histogram spans a symmetric range that doubles when data fall outside, two bins becoming one, so no value is
    ever counted in the wrong place.

    Args:
        scale: by which values are divided first, along their last dimension.
    """

    def __init__(self, scale: np.ndarray | None = None):
        self._scale = scale
        # of the largest and the smallest value of each update: how many, sum, sum of squares
        self._extremes = np.zeros((2, 3))
        self.low, self.high = np.inf, -np.inf
        self.counts = np.zeros(BINS, np.int64)
        self._span = 0.0

    def update(self, values: np.ndarray) -> None:
        """Count `values`, any shape.

        Raises:
            ValueError: a value is not finite.
        """
        values = np.asarray(values, np.float32)
        values = (values if self._scale is None else values / self._scale).ravel()
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("values that are not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        ends = np.array([-low, high])
        self._extremes += np.stack([np.ones(2), ends, ends**2], axis=1)
        largest = max(-low, high)
        if self._span == 0.0 and largest > 0.0:
            self._span = largest
            # what was counted before was all zeros, which lie at the first bin above the middle
        while largest > self._span > 0.0:
            self._double()
        self.counts += np.histogram(values, BINS, (-(self._span or 1.0), self._span or 1.0))[0]

    @classmethod
    def spanning(cls, low: float, high: float) -> RangeObserver:
        """As if nothing but these two had been seen: enough for min-max."""
        observer = cls()
        observer.update(np.array([low, high]))
        return observer

    def expected(self, times: float = AHEAD) -> tuple[float, float]:
        """Smallest and largest value to be expected in `times` as many updates as were seen, at least what was seen.

        The return level of extreme value theory: extremes of the updates are taken to follow a Gumbel distribution,
        fitted by its moments (Gumbel, 1958).
        """
        ends = np.array([-self.low, self.high])
        count, total, squares = self._extremes.T
        deviation = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
        spread = deviation * np.sqrt(6) / np.pi
        levels = np.maximum(ends, total / count + spread * (np.log(times * count) - np.euler_gamma))
        return -float(levels[0]), float(levels[1])

    @property
    def centers(self) -> np.ndarray:
        """(BINS,) value each bin stands for."""
        edges = np.linspace(-self._span, self._span, BINS + 1)
        return (edges[1:] + edges[:-1]) / 2

    def _double(self) -> None:
        pairs = self.counts.reshape(-1, 2).sum(1)
        self.counts = np.zeros(BINS, np.int64)
        self.counts[BINS // 4 : BINS // 4 + BINS // 2] = pairs
        self._span *= 2


def calibrate(
    observer: RangeObserver, calibrator: str = "minmax", percentile: float = 99.99, form: str = "int8"
) -> ActivationQuant:
    """The 8-bit grid for what `observer` saw.

    Args:
        calibrator: "minmax" covers everything; "tail" also what more of the same data is likely to hold (see
            `RangeObserver.expected`); "percentile" leaves out the rarest values on both sides together;
            "mse" takes the clipping with the least expected squared error (as in TensorRT's and NNCF's MSE search).
        form: "int8", unsigned with a zero point, or "fp8", symmetric.

    Raises:
        ValueError: nothing was seen, or the calibrator is unknown.
    """
    if not np.isfinite(observer.low):
        raise ValueError("no values")
    grid = _fp8_grid if form == "fp8" else _grid
    low, high = observer.expected() if calibrator == "tail" else (observer.low, observer.high)
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return grid(0.0, 0.0)
    if calibrator in ("minmax", "tail"):
        return grid(low, high)
    if calibrator == "percentile":
        tail = (1 - percentile / 100) / 2
        cumulative = np.cumsum(observer.counts) / observer.counts.sum()
        centers = observer.centers
        inside_low = centers[np.searchsorted(cumulative, tail)]
        inside_high = centers[min(np.searchsorted(cumulative, 1 - tail), BINS - 1)]
        return grid(max(low, min(inside_low, 0.0)), min(high, max(inside_high, 0.0)))
    if calibrator == "mse":
        grids = [grid(low * clip, high * clip) for clip in _CLIPS]
        return min(grids, key=lambda found: _squared_error(observer, found))
    raise ValueError(f"calibrator {calibrator!r} is not one of {', '.join(CALIBRATORS)}")


def _grid(low: float, high: float) -> ActivationQuant:
    """Unsigned 8 bits over [low, high], which contains 0; 0 falls on a point of the grid exactly."""
    scale = float(np.float32((high - low) / 255))
    if scale <= 0.0:
        return ActivationQuant("static", 1.0, 0)
    return ActivationQuant("static", scale, int(np.clip(np.rint(-low / scale), 0, 255)))


def _fp8_grid(low: float, high: float) -> ActivationQuant:
    scale = float(np.float32(max(-low, high) / FP8.largest))
    return ActivationQuant("static", scale if scale > 0.0 else 1.0, format="fp8")


def round_inputs(values: np.ndarray, grid: ActivationQuant) -> np.ndarray:
    """float32 `values` as a static grid shows them."""
    scaled = np.asarray(values, np.float32) / np.float32(grid.scale)
    if grid.format == "fp8":
        return FP8.nearest(scaled) * np.float32(grid.scale)
    return (np.clip(np.rint(scaled) + grid.zero_point, 0, 255) - grid.zero_point) * np.float32(grid.scale)


def _squared_error(observer: RangeObserver, grid: ActivationQuant) -> float:
    x = observer.centers
    return float(((round_inputs(x, grid) - x) ** 2 * observer.counts).sum())
