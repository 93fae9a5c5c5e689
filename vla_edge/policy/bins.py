"""Actions as tokens: the last 256 words of the vocabulary stand for bins of [-1, 1] (RT-2, OpenVLA)."""

from __future__ import annotations

import numpy as np

BINS = 256


def bin_values() -> np.ndarray:
    """(256,) float64 value of each of the last 256 words, in the order of their ids.

    The highest id stands for the lowest bin. 256 edges have 255 centres between them, so the two lowest ids share one.
    """
    edges = np.linspace(-1, 1, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    return centres[np.clip(BINS - 1 - np.arange(BINS), 0, BINS - 2)]


def bins_of(values: np.ndarray) -> np.ndarray:
    """Which of the 256 words stands for each of these values, int64; what lies beyond [-1, 1] counts as its end.

    Values of 1 and above have the word with the lowest id to themselves, although its value is that of the next.
    """
    return BINS - np.digitize(np.clip(values, -1, 1), np.linspace(-1, 1, BINS)).astype(np.int64)
