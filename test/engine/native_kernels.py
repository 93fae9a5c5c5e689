"""The compiled kernels, and their ways that this processor runs: a skip for each of the others would say nothing."""

import ctypes

from vla_edge.engine.native import library

KERNELS = ctypes.CDLL(str(library())) if library() is not None else None
WAYS = [
    way for way in ("avx512_vnni", "avx_vnni", "avx2", "neon_dot")
    if KERNELS is not None and KERNELS.vla_edge_runs(way.encode())
]  # fmt: skip
