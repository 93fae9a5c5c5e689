"""A flow led so that its actions continue a plan: the part of a chunk that is known stays, the rest is made to fit.

Flow time t runs from 1 (noise) to 0 (actions), x = t noise + (1 - t) actions, and the network's velocity v points at
the noise, so that A = x - t v is what it now believes the actions to be. `inpaint` moves A towards the target Y by the
weights W. Where W is 1 this keeps x on the straight way from its noise to Y, so that the network sees, at every step,
the part that is known at the noise it expects.

Real-time chunking (Black, Galliker and Levine, 2025, arXiv:2506.07339) multiplies W (Y - A) with the transposed
Jacobian of A, which takes a backward pass that no exported stage has. doc/serving.md compares the two: inpainting needs
no backward pass, costs nothing, and meets the frozen part exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla_edge.types import freeze

Lead = Callable[[np.ndarray, np.ndarray, float, np.ndarray, np.ndarray], np.ndarray]
"""(x, v, t, Y, W) -> the velocity to go on with; arrays (1, T, A) float32."""


def inpaint(x: np.ndarray, v: np.ndarray, t: float, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """v - W (Y - A) / t, see the file's first lines."""
    return v - weights * (target - (x - np.float32(t) * v)) / np.float32(t)


@dataclass(frozen=True)
class Continuation:
    """What a chunk has to continue.

    Attributes:
        positions: (T, J) rad, absolute: where the running plan has the joints at the moments of the chunk's rows.
        weights: (T,) from 0, free, to 1, frozen.
        begin: flow time from which on it is led, 1 for all of it; the last step always is.
        lead: how the flow is led there.
        prefix: rows that are given to the policy as they are, without noise; what a policy has to be trained for
            (Black et al., 2025, arXiv:2512.05964). `weights`, `begin` and `lead` then do not matter.
    """

    positions: np.ndarray
    weights: np.ndarray
    begin: float = 1.0
    lead: Lead = inpaint
    prefix: int = 0

    def __post_init__(self):
        object.__setattr__(self, "positions", freeze(self.positions, shape=(None, None), what="Continuation.positions"))
        rows = len(self.positions)
        object.__setattr__(self, "weights", freeze(self.weights, shape=(rows,), what="Continuation.weights"))
