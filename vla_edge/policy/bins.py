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
