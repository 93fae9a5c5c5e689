"""Products with 4-bit weights by ggml, the library of llama.cpp, from llama-cpp-python's own files: what a runtime that is
made for decoding reaches on the same shapes.

llama.cpp keeps weights of this type rearranged for the processor where it has kernels for that ("CPU_REPACK"); so does
this, and says so in `kind`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.engine.gguf_blocks import blocks

F32, Q4_0 = 0, 2  # of `enum ggml_type`
HEADERS = 1 << 20  # bytes, room for descriptions of tensors and graphs
ABSENT = 'llama-cpp-python is not part of this environment; "$(tools/peer_environment.sh llama_cpp)" has it'
_POINTER = (
    "ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_backend_cpu_init",
    "ggml_backend_get_device", "ggml_backend_dev_backend_reg", "ggml_backend_reg_get_proc_address",
    "ggml_backend_get_default_buffer_type", "ggml_backend_alloc_ctx_tensors_from_buft",
)  # fmt: skip


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(level, text, data) -> None:
    """A line for each matrix that is rearranged says nothing."""


class _Parameters(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def library() -> ctypes.CDLL | None:
    """ggml as llama-cpp-python brings it, or None where that is not installed."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return None
    ggml = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libggml.so"))
    for name in _POINTER:
        getattr(ggml, name).restype = ctypes.c_void_p
    ggml.ggml_backend_buft_name.restype = ctypes.c_char_p
    ggml.ggml_init.argtypes = [_Parameters]
    ggml.ggml_log_set(_quiet, None)
    return ggml


class GgmlChain:
    """x (in,) through one matrix after the other, in Q4_0, with inputs rounded to 8 bits as llama.cpp always does.

    Args:
        ggml: `library()`. weights: int4, groups of 32 inputs or multiples.

    Attributes:
        kind: how ggml keeps the weights. nbytes: of the weights.
    """

    def __init__(self, ggml: ctypes.CDLL, weights: Sequence[QuantizedWeight], threads: int):
        self._ggml = ggml
        self._backend = _p(ggml.ggml_backend_cpu_init())
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        kept, computed = (_p(ggml.ggml_init(_Parameters(HEADERS, None, True))) for _ in range(2))
        tensors = [_p(ggml.ggml_new_tensor_2d(kept, Q4_0, *map(_n, w.values.shape[::-1]))) for w in weights]
        buffer_type = self._buffer_type()
        self.kind = ggml.ggml_backend_buft_name(buffer_type).decode()
        if not ggml.ggml_backend_alloc_ctx_tensors_from_buft(kept, buffer_type):
            raise MemoryError("ggml cannot allocate the weights")
        self.nbytes = 0
        for tensor, weight in zip(tensors, weights):
            data = blocks(weight, "a matrix")
            ggml.ggml_backend_tensor_set(tensor, _a(data), _n(0), _n(data.nbytes))
            self.nbytes += data.nbytes
        self._x = y = _p(ggml.ggml_new_tensor_2d(computed, F32, _n(weights[0].values.shape[1]), _n(1)))
        for tensor in tensors:
            y = _p(ggml.ggml_mul_mat(computed, tensor, y))
        self._y, self._out = y, np.zeros(weights[-1].values.shape[0], np.float32)
        self._graph = _p(ggml.ggml_new_graph(computed))
        ggml.ggml_build_forward_expand(self._graph, y)
        plain = _p(ggml.ggml_backend_get_default_buffer_type(self._backend))
        if not ggml.ggml_backend_alloc_ctx_tensors_from_buft(computed, plain):
            raise MemoryError("ggml cannot allocate the tensors between products")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(out,) float32, the same array every time."""
        ggml, x = self._ggml, np.ascontiguousarray(x, np.float32)
        ggml.ggml_backend_tensor_set(self._x, _a(x), _n(0), _n(x.nbytes))
        if ggml.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("ggml cannot compute the products")
        ggml.ggml_backend_tensor_get(self._y, _a(self._out), _n(0), _n(self._out.nbytes))
        return self._out

    def _buffer_type(self) -> ctypes.c_void_p:
        """Where llama.cpp puts such weights: rearranged where the processor has kernels for it."""
        ggml = self._ggml
        device = _p(ggml.ggml_backend_get_device(self._backend))
        registry = _p(ggml.ggml_backend_dev_backend_reg(device))
        address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        for index in range(16):
            if not extra or not extra[index]:
                break
            if ggml.ggml_backend_buft_name(_p(extra[index])) == b"CPU_REPACK":
                return _p(extra[index])
        return _p(ggml.ggml_backend_get_default_buffer_type(self._backend))


def _p(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _n(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def _a(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
