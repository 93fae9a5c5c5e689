"""The few calls of the CUDA runtime that a stage on a GPU needs: memory, one stream, copies, a captured graph.

Two providers behind them: cuda-python (`cuda.bindings.runtime`), and pycuda for robots that already have it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vla_edge.engine.backends import BackendError, one_line


class CudaError(BackendError):
    """A CUDA call that failed, or no CUDA device."""


class Cuda(Protocol):
    """Device memory is an address, a stream and a graph are whatever the provider makes them."""

    def compute_capability(self) -> str:
        """Of the device, as "8.7"."""

    def allocate(self, count: int) -> int: ...
    def free(self, address: int) -> None: ...
    def stream(self): ...
    def handle(self, stream) -> int: ...
    def copy_in(self, address: int, array: np.ndarray, stream) -> None: ...
    def copy_out(self, array: np.ndarray, address: int, stream) -> None: ...
    def wait(self, stream) -> None: ...
    def begin_capture(self, stream) -> None: ...
    def end_capture(self, stream): ...
    def launch(self, graph, stream) -> None: ...


def open_cuda() -> Cuda:
    """The first provider that is installed, with its device.

    Raises:
        CudaError: neither is installed, or there is no device.
    """
    for provider in (CudaPython, PyCuda):
        try:
            return provider()
        except ImportError:
            continue
    raise CudaError(
        "a TensorRT engine needs cuda-python or pycuda to reach the GPU; install it with pip install cuda-python"
    )


class CudaPython:
    """cuda-python 12 and 13.

    Args:
        api: stands in for `cuda.bindings.runtime`.
    """

    def __init__(self, api=None):
        if api is None:
            from cuda.bindings import runtime as api
        self._api = api
        try:
            count = self._do("cudaGetDeviceCount")
        except CudaError as error:
            raise CudaError(f"there is no CUDA device here ({error})") from error
        if count < 1:
            raise CudaError("there is no CUDA device here")

    def compute_capability(self) -> str:
        kinds = self._api.cudaDeviceAttr
        attributes = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        return ".".join(str(self._do("cudaDeviceGetAttribute", attribute, 0)) for attribute in attributes)

    def allocate(self, count: int) -> int:
        return int(self._do("cudaMalloc", count))

    def free(self, address: int) -> None:
        self._do("cudaFree", address)

    def stream(self):
        return self._do("cudaStreamCreate")

    def handle(self, stream) -> int:
        return int(stream)

    def copy_in(self, address: int, array: np.ndarray, stream) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_out(self, array: np.ndarray, address: int, stream) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def wait(self, stream) -> None:
        self._do("cudaStreamSynchronize", stream)

    def begin_capture(self, stream) -> None:
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream):
        return self._do("cudaGraphInstantiate", self._do("cudaStreamEndCapture", stream), 0)

    def launch(self, graph, stream) -> None:
        self._do("cudaGraphLaunch", graph, stream)

    def _do(self, name: str, *arguments):
        """The result of a call, which returns its error first."""
        try:
            code, *results = getattr(self._api, name)(*arguments)
        except RuntimeError as error:  # the library itself is missing
            raise CudaError(f"CUDA cannot be used here: {one_line(error)}") from error
        if int(code) != 0:
            hint = "; use a smaller engine, or free memory" if int(code) == 2 else ""
            raise CudaError(f"{name} failed with {getattr(code, 'name', code)}{hint}")
        return results[0] if results else None


class PyCuda:
    """pycuda, which captures no graphs: a stage is then launched kernel by kernel.

    Args:
        api: stands in for `pycuda.driver`.
    """

    def __init__(self, api=None):
        if api is None:
            import pycuda.driver as api
        self._api = api
        try:
            api.init()
            self._device = api.Device(0)
            self._context = self._device.retain_primary_context()
            self._context.push()
        except api.Error as error:
            raise CudaError(f"CUDA cannot be used here: {one_line(error)}") from error
        self._memory: dict[int, object] = {}

    def compute_capability(self) -> str:
        return ".".join(str(number) for number in self._device.compute_capability())

    def allocate(self, count: int) -> int:
        memory = self._do(self._api.mem_alloc, count)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._memory.pop(address).free()

    def stream(self):
        return self._api.Stream()

    def handle(self, stream) -> int:
        return stream.handle

    def copy_in(self, address: int, array: np.ndarray, stream) -> None:
        self._do(self._api.memcpy_htod_async, address, array, stream)

    def copy_out(self, array: np.ndarray, address: int, stream) -> None:
        self._do(self._api.memcpy_dtoh_async, array, address, stream)

    def wait(self, stream) -> None:
        self._do(stream.synchronize)

    def begin_capture(self, stream) -> None:
        raise CudaError("pycuda captures no CUDA graphs")

    def end_capture(self, stream):
        raise CudaError("pycuda captures no CUDA graphs")

    def launch(self, graph, stream) -> None:
        raise CudaError("pycuda captures no CUDA graphs")

    def _do(self, call, *arguments):
        try:
            return call(*arguments)
        except self._api.Error as error:
            raise CudaError(f"CUDA: {one_line(error)}") from error
