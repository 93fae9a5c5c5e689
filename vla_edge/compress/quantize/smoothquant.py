"""SmoothQuant (Xiao et al., 2022, arXiv:2211.10438): outliers of activations are moved into the weights, where a scale
for each output channel can hold them, so that both fit 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.compress.statistics import InputStatistics

STRENGTHS = tuple(np.linspace(0.0, 1.0, 21))
_SMALLEST = 1e-5
_CACHED = 1 << 17  # weights tried together: as many as the cache of a core holds, with what is made of them


def smoothing_scale(statistics: InputStatistics, weights: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """(in,) s_j = max|x_j|^alpha / max|w_j|^(1 - alpha): x is divided by it, the columns of the weights multiplied.

    Args:
        weights: (out, in) of every layer that reads x.
        alpha: how much of the difficulty moves from activations to weights, 0 to 1.
    """
    return _traded(statistics.largest, _peaks(weights), alpha)


def _peaks(weights: Sequence[np.ndarray]) -> np.ndarray:
    return np.max([np.abs(weight).max(0) for weight in weights], axis=0)


def _traded(largest: np.ndarray, columns: np.ndarray, alpha: float) -> np.ndarray:
    # a channel that carries nothing needs no protection
    used = (largest > _SMALLEST) & (columns > _SMALLEST)
    scale = np.ones_like(columns)
    scale[used] = largest[used] ** alpha / columns[used] ** (1 - alpha)
    return np.clip(scale, _SMALLEST, 1 / _SMALLEST).astype(np.float32)


def best_smoothing(
    statistics: InputStatistics,
    weights: Sequence[np.ndarray],
    quantizers: Sequence[Callable[[np.ndarray], QuantizedWeight]],
    points: int = 255,
    group: int | None = None,
) -> tuple[np.ndarray, float | None]:
    """The scale of the alpha that leaves the least error at the outputs, and that alpha; None for no scaling at all.

    The paper tunes one alpha for a whole model. Here each input gets its own, from the two errors it trades: rounding
    of weights, channels taken to be independent, and of activations, taken as noise uniform within a step.

    Args:
        weights: (out, in) of every layer that reads x. quantizers: how each will be rounded.
        points: of the grid that x is rounded to. group: channels of x that share a step; all of them when None.
    """
    best, largest, columns = None, statistics.largest, _peaks(weights)
    some = max(1, _CACHED // len(largest))  # outputs are apart from each other
    parts = [
        (weight[begin : begin + some], quantize)
        for weight, quantize in zip(weights, quantizers)
        for begin in range(0, len(weight), some)
    ]
    for alpha in (None, *STRENGTHS):
        scale = np.ones(len(largest), np.float32) if alpha is None else _traded(largest, columns, alpha)
        smooth = statistics.scaled(1 / scale)
        width = group or len(scale)
        noise = np.square(np.repeat(2 * smooth.largest.reshape(-1, width).max(1) / points, width)) / 12
        energy = smooth.energy
        error = 0.0
        for part, quantize in parts:
            scaled = part * scale
            seen = quantize(scaled).dequantize()
            error += float(np.einsum("oi,oi->i", seen, seen) @ noise)
            seen -= scaled
            error += float(np.einsum("oi,oi->i", seen, seen) @ energy)
        if best is None or error < best[0]:
            best = error, scale, alpha
    return best[1], best[2]
