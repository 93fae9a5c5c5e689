"""Kernels of our own, in C, which ONNX Runtime runs as operators on its threads, where runtimes leave speed unused.

    int4_products   weights of 4 bits with inputs rounded to 8
    int8_products   weights of 8 bits with inputs rounded to 8
    attention       softmax of products, in whole numbers of 16 bits
    rotary          rotary embeddings, in one pass

Installing the package compiles them where there is a C compiler; without them runtimes use their own. A build tries
them as one more way of running a stage (`own_kernels: true` of the ONNX Runtime backend).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

DOMAIN = "vla_edge"


@lru_cache(maxsize=1)
def library() -> Path | None:
    """The compiled kernels where they are installed and this processor can run them, else None."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        return None
    try:
        kernels = ctypes.CDLL(str(found[-1]))
    except OSError:  # built for another computer
        return None
    return found[-1] if kernels.vla_edge_runs(None) else None
