"""How late things happened, in a histogram whose memory is fixed before the first tick."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

_BITS = 5  # 32 bins per octave: a percentile is right to 1/32
_PER_OCTAVE = 1 << _BITS
BINS = (37 - _BITS) * _PER_OCTAVE
"""Bins of a histogram; the last one takes everything from 68 s on."""


def _upper_edge(index: int) -> int:
    """Largest ns that falls into bin `index`."""
    shift = max(index // _PER_OCTAVE - 1, 0)
    return ((index - shift * _PER_OCTAVE + 1) << shift) - 1


class LatenessHistogram:
    """Counts of lateness in ns, logarithmic bins with an error under 3.2 %; `add` allocates nothing.

    Args:
        counts: BINS integers to go on from, such as another process's.
    """

    def __init__(self, counts: Iterable[int] | None = None, maximum_ns: int = 0):
        self.counts = array("q", bytes(8 * BINS) if counts is None else (int(count) for count in counts))
        self.maximum_ns = int(maximum_ns)

    def add(self, late_ns: int) -> None:
        """Count one; a negative lateness counts as none."""
        if late_ns < _PER_OCTAVE:
            index = late_ns if late_ns > 0 else 0
        else:
            shift = late_ns.bit_length() - _BITS - 1
            index = (shift << _BITS) + (late_ns >> shift)
            if index >= BINS:
                index = BINS - 1
        self.counts[index] += 1
        if late_ns > self.maximum_ns:
            self.maximum_ns = late_ns

    @property
    def total(self) -> int:
        return sum(self.counts)

    def percentile_us(self, percent: float) -> float:
        """us that `percent` of the counts do not exceed; NaN when empty."""
        counts = np.asarray(self.counts)
        total = int(counts.sum())
        if not total:
            return float("nan")
        index = int(np.searchsorted(np.cumsum(counts), percent / 100.0 * total))
        return min(_upper_edge(min(index, BINS - 1)), self.maximum_ns) / 1e3

    def summary(self) -> dict[str, float]:
        """p50, p99, p999 and max, us."""
        return {
            "p50": self.percentile_us(50.0),
            "p99": self.percentile_us(99.0),
            "p999": self.percentile_us(99.9),
            "max": self.maximum_ns / 1e3,
        }
