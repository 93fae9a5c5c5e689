"""The compiled kernels, and their ways that this processor runs: a skip for each of the others would say nothing."""

import ctypes

import numpy as np
import onnx

from vla_edge.engine.native import library

KERNELS = ctypes.CDLL(str(library())) if library() is not None else None
WAYS = [
    way for way in ("avx512_vnni", "avx_vnni", "avx2", "neon_dot")
    if KERNELS is not None and KERNELS.vla_edge_runs(way.encode())
]  # fmt: skip


def shorten_weights(path, dimension):
    """Have a stage file for the kernels lie: its weights are one less along a dimension than its nodes say."""
    model = onnx.load(str(path))
    blocks = next(constant for constant in model.graph.initializer if constant.name.endswith(".blocks"))
    blocks.dims[dimension] -= 1
    blocks.raw_data = blocks.raw_data[: int(np.prod(blocks.dims))]
    path.write_bytes(model.SerializeToString())
