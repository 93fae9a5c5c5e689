"""What runs a TensorRT plan on a GPU, held to an imitation of the CUDA calls."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cuda import FakeRuntimeApi, FakeTensorRt

from vla_edge.engine.backends import BackendError, StageInterface
from vla_edge.engine.backends.cuda import CudaError, CudaPython, PyCuda
from vla_edge.engine.backends.tensorrt_common import TensorRt
from vla_edge.engine.kernels import KERNELS, Kernel, kernels_beside
from vla_edge.policy.stages import TensorSpec

SHAPE = (1, 6)
STAGE = StageInterface("s", (TensorSpec("x", SHAPE),), (TensorSpec("y", SHAPE),))
OPTIONS = {"compute_capability": "8.7", "built_by": "10.3.0"}


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "s.plan").write_bytes(b"plan of s")
    return tmp_path / "s.plan"


def backend(api: FakeRuntimeApi, tensors=None):
    trt = FakeTensorRt(api, tensors or {"x": ("in", SHAPE), "y": ("out", SHAPE)})
    return trt, TensorRt("tensorrt", trt, ahead=False, cuda=lambda: CudaPython(api))


@pytest.mark.parametrize("captures", [True, False], ids=["one graph", "no graphs"])
def test_every_run_reads_what_the_arrays_hold_then(plan, captures):
    api = FakeRuntimeApi(captures=captures)
    trt, runtime = backend(api)
    stage = runtime.load(plan, STAGE, OPTIONS)
    x, y = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
    step = stage.bind({"x": x}, {"y": y})
    for value in (1.0, 2.0, 3.0):
        x[...] = value
        step()
        np.testing.assert_array_equal(y, 2 * value)
    assert (trt.enqueued, api.launches) == ((2, 2) if captures else (3, 0)), "the first run is not from a graph"
    np.testing.assert_array_equal(stage.run({"x": x})["y"], 6.0)


def test_the_memory_of_a_stage_is_given_back(plan):
    api = FakeRuntimeApi()
    stage = backend(api)[1].load(plan, STAGE, OPTIONS)
    assert len(api.memory) == 2
    stage.close()
    assert not api.memory
    backend(api)[1].load(plan, STAGE, OPTIONS)
    gc.collect()
    assert not api.memory


@pytest.mark.parametrize(
    ("api", "options", "says"),
    [
        (FakeRuntimeApi(devices=0), OPTIONS, "there is no CUDA device"),
        (FakeRuntimeApi(capability=(8, 6)), OPTIONS, "compute capability 8.7, this one has 8.6; build"),
        (FakeRuntimeApi(), OPTIONS | {"built_by": "10.16.0"}, "built by tensorrt 10.16.0, here is 10.3.0; build"),
        (FakeRuntimeApi(room=30), OPTIONS, "cudaMalloc failed.*smaller engine"),
    ],
    ids=["no device", "other GPU", "other version", "out of memory"],
)
def test_what_cannot_run_here_is_a_named_error(plan, api, options, says):
    with pytest.raises(BackendError, match=says):
        backend(api)[1].load(plan, STAGE, options)


def test_a_damaged_plan_or_one_with_other_tensors_is_a_backend_error(plan):
    with pytest.raises(BackendError, match="other tensors"):
        backend(FakeRuntimeApi(), {"x": ("in", SHAPE), "z": ("out", SHAPE)})[1].load(plan, STAGE, OPTIONS)
    plan.write_bytes(b"nothing")
    with pytest.raises(BackendError, match="cannot load"):
        backend(FakeRuntimeApi())[1].load(plan, STAGE, OPTIONS)


def test_the_kernels_of_a_plan_are_told_and_timed(plan):
    api = FakeRuntimeApi()
    runtime = backend(api)[1]
    assert kernels_beside(plan) == ()
    plan.with_suffix(KERNELS).write_text(runtime.kernels(plan.read_bytes(), STAGE))
    assert kernels_beside(plan) == (Kernel("double", "PointWise", "twice_f32", ms=0.25), Kernel("last"))
    assert not api.memory, "the memory it was timed in is given back"
    with pytest.raises(BackendError, match="cannot load the plan"):
        runtime.kernels(b"nothing", STAGE)


@pytest.mark.peers
def test_the_real_cuda_python_without_a_device_is_a_named_error():
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    try:
        CudaPython()
    except CudaError as error:
        assert "cuda" in str(error).lower()
    else:
        pytest.skip("there is a CUDA device here")


class FakePyCuda:
    """Stands in for `pycuda.driver`."""

    class Error(Exception):
        pass

    def __init__(self):
        self.live = 0

    def init(self):
        pass

    def Device(self, index):
        return SimpleNamespace(
            retain_primary_context=lambda: SimpleNamespace(push=lambda: None), compute_capability=lambda: (8, 7)
        )

    def Stream(self):
        return SimpleNamespace(handle=7, synchronize=lambda: None)

    def mem_alloc(self, count):
        if count > 1000:
            raise self.Error("out of memory")
        api = self
        self.live += 1

        class Memory:
            def __init__(self):
                self.array = np.zeros(count, np.uint8)

            def __int__(self):
                return self.array.ctypes.data

            def free(self):
                api.live -= 1

        return Memory()

    @staticmethod
    def memcpy_htod_async(address, array, stream):
        import ctypes

        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    @staticmethod
    def memcpy_dtoh_async(array, address, stream):
        import ctypes

        ctypes.memmove(array.ctypes.data, address, array.nbytes)


def test_pycuda_serves_the_same_calls_without_graphs(plan):
    api = FakePyCuda()
    trt = FakeTensorRt(FakeRuntimeApi(), {"x": ("in", SHAPE), "y": ("out", SHAPE)})
    stage = TensorRt("tensorrt", trt, ahead=False, cuda=lambda: PyCuda(api)).load(plan, STAGE, OPTIONS)
    for value in (1.0, 2.0):
        found = stage.run({"x": np.full(SHAPE, value, np.float32)})["y"]
        np.testing.assert_array_equal(found, 2 * value)
    stage.close()
    assert api.live == 0
    with pytest.raises(CudaError, match="out of memory"):
        PyCuda(api).allocate(2000)
