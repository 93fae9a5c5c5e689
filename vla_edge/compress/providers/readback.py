"""What a library has chosen, in our representation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vla_edge.compress.quantize.formats import number_format
from vla_edge.compress.quantize.weights import ActivationQuant, QuantizedWeight
from vla_edge.compress.steps import CHANNEL, Quantize


def read_weight(points: np.ndarray, steps: np.ndarray, step: Quantize) -> QuantizedWeight:
    """Weights as multiples of their steps.

    Args:
        points: (out, in) float32; what is between two points of the grid goes to the nearest, as in the library.
        steps: (out, groups) float32, one group for the whole channel; the sign of a group may be turned.
    """
    grid = number_format(step.weights)
    group = None if step.group_size in (None, CHANNEL) else points.shape[1] // steps.shape[1]
    scales, whole = grid.store_steps(steps if group else steps.reshape(-1))
    values = replace(grid, full=grid.is_integer).nearest(points)
    return QuantizedWeight(values, scales, grid.name, group, whole)


def in_steps(weight: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """(out, in) weights over their (out, groups) steps."""
    return (weight.reshape(*steps.shape, -1) / steps[..., None]).reshape(weight.shape)


def read_activation(scale, zero_point, lowest: int) -> ActivationQuant:
    """A static 8-bit grid. `lowest`: the first of the library's integers; ours is 0."""
    return ActivationQuant("static", float(scale), int(zero_point) - lowest)


def as_numpy(tensor) -> np.ndarray:
    """float32, on the CPU."""
    return tensor.detach().cpu().float().numpy()
