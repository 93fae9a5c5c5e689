"""A small imitation of the CUDA calls and of TensorRT's runtime: device memory is memory of this process.

The engine doubles its input. While a stream is captured, what is enqueued is recorded and runs when the graph is
launched, as on a GPU; copies while capturing are errors, and so is memory that was never allocated.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import SimpleNamespace

import numpy as np


class Code(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class FakeRuntimeApi:
    """Stands in for `cuda.bindings.runtime`."""

    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, capability=(8, 7), devices: int = 1, room: int = 1 << 20, captures: bool = True):
        self.capability, self.devices, self.room, self.captures = capability, devices, room, captures
        self.memory: dict[int, ctypes.Array] = {}
        self.recording: list | None = None
        self.launches = 0

    def cudaGetDeviceCount(self):
        return Code.cudaSuccess, self.devices

    def cudaDeviceGetAttribute(self, attribute, device):
        return Code.cudaSuccess, self.capability[attribute - 75]

    def cudaMalloc(self, count):
        if sum(map(len, self.memory.values())) + count > self.room:
            return Code.cudaErrorMemoryAllocation, None
        block = ctypes.create_string_buffer(count)
        self.memory[ctypes.addressof(block)] = block
        return Code.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address):
        del self.memory[address]
        return (Code.cudaSuccess,)

    def cudaStreamCreate(self):
        return Code.cudaSuccess, 7

    def cudaMemcpyAsync(self, target, source, count, kind, stream):
        if self.recording is not None:
            return (Code.cudaErrorStreamCaptureUnsupported,)
        assert (target if kind == 1 else source) in self.memory and stream == 7
        ctypes.memmove(target, source, count)
        return (Code.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        return (Code.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        if not self.captures:
            return (Code.cudaErrorStreamCaptureUnsupported,)
        self.recording = []
        return (Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.recording = self.recording, None
        return Code.cudaSuccess, recorded

    def cudaGraphInstantiate(self, graph, flags):
        return Code.cudaSuccess, graph

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for kernel in graph:
            kernel()
        return (Code.cudaSuccess,)


class FakeTensorRt:
    """Stands in for the module `tensorrt`: loads plans that start with b"plan"."""

    __version__ = "10.3.0"
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    LayerInformationFormat = SimpleNamespace(JSON="json", ONELINE="line")

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    class IProfiler:
        pass

    def __init__(self, api: FakeRuntimeApi, tensors: dict[str, tuple[str, tuple[int, ...]]]):
        self.api, self.tensors, self.enqueued = api, tensors, 0

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self._engine() if plan[:4] == b"plan" else None)

    def _engine(self):
        names = list(self.tensors)
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: self.tensors[name][0],
            create_execution_context=self._context,
            create_engine_inspector=lambda: SimpleNamespace(get_engine_information=self._information),
        )

    @staticmethod
    def _information(form: str) -> str:
        assert form == "json"
        return '{"Layers": [{"Name": "double", "LayerType": "PointWise", "TacticName": "twice_f32"}, "last"]}'

    def _context(self):
        addresses: dict[str, int] = {}

        def kernel() -> None:
            (x, (_, shape)), (y, _) = self.tensors.items()
            size = int(np.prod(shape))
            source, target = (np.ctypeslib.as_array((ctypes.c_float * size).from_address(addresses[n])) for n in (x, y))
            target[...] = 2 * source

        def enqueue(handle: int) -> bool:
            assert handle == 7 and set(addresses) == set(self.tensors)
            self.enqueued += 1
            kernel() if self.api.recording is None else self.api.recording.append(kernel)
            if context.profiler is not None:
                context.profiler.report_layer_time("double", 0.25)
            return True

        context = SimpleNamespace(
            set_input_shape=lambda name, shape: True,
            set_tensor_address=addresses.__setitem__,
            execute_async_v3=enqueue,
            profiler=None,
        )
        return context
