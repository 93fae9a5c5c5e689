"""The starting noise of a flow policy, a function of a seed and the observation's stamp alone.

Live and offline runs of the same observation therefore draw the same noise, on any machine and in any order.
"""

from __future__ import annotations

import numpy as np


def noise_for(seed: int, stamp_ns: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise, `shape` float32 (Philox 4x64, Salmon et al., SC 2011)."""
    # an array: numpy makes floats of a list that holds a number beyond 2**63, and nanoseconds would be lost
    key = np.array([seed & (2**64 - 1), stamp_ns & (2**64 - 1)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
