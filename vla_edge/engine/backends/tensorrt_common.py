"""One code path for TensorRT (10.3 of JetPack 6.2 to 11) and TensorRT for RTX: build a plan, load it, run it.

TensorRT for RTX also builds for GPUs that are not here (`compute_capability` in the options); TensorRT builds on the
robot itself. A plan runs on the version and the compute capability it was built for and is refused elsewhere.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface, check_tensors, contiguous
from vla_edge.engine.backends.cuda import Cuda, CudaError, open_cuda
from vla_edge.engine.backends.tensorrt_plan import read, refusals, two_to_four
from vla_edge.engine.kernels import KERNELS, MILLISECONDS

# as the Jetson AGX Orin; the nearest that TensorRT for RTX builds for is 8.6
DEFAULT_CAPABILITY = "8.6"
_TIMED_CALLS = 11


class TensorRt:
    """A backend module's functions over one of the two libraries.

    Args:
        name: of the backend. api: the Python module of the library.
        ahead: whether it builds for GPUs that are not here.
        cuda: opens the device.
    """

    def __init__(self, name: str, api, ahead: bool, cuda: Callable[[], Cuda] = open_cuda):
        self.name, self._api, self._ahead, self._open = name, api, ahead, cuda
        self._logger = None
        self._cuda: Cuda | None = None

    def version(self) -> str:
        """Of the library."""
        return self._api.__version__

    def precisions(self) -> tuple[str, ...]:
        """What it multiplies in, on GPUs that can."""
        return ("float32", "float16", "bfloat16", "int8", "int4 weights", "fp8", "nvfp4")

    def runs_here(self) -> bool:
        """Whether there is a CUDA device."""
        try:
            self.device()
        except CudaError:
            return False
        return True

    def device(self) -> Cuda:
        """The CUDA device. Raises CudaError when there is none."""
        if self._cuda is None:
            self._cuda = self._open()
        return self._cuda

    def candidates(self, onnx: str | Path) -> list[dict]:
        """One way: for the GPU that is here, or for the default one."""
        return [{"compute_capability": self.device().compute_capability() if self.runs_here() else DEFAULT_CAPABILITY}]

    def gains_by_reduced_range(self) -> bool:
        """Never: sums are of 32 bits."""
        return False

    def build(self, onnx: str | Path, directory: str | Path, stage: StageInterface, options=None) -> BuiltStage:
        """Compile the file into a plan in `directory`.

        Args:
            options: `compute_capability` as "8.6".

        Raises:
            BackendError: why it cannot be built for that GPU.
        """
        options = {**self.candidates(onnx)[0], **(options or {})}
        wanted = str(options["compute_capability"])
        model = read(onnx)
        reasons = refusals(model, _number(wanted))
        if reasons:
            raise BackendError(
                f"stage {stage.name!r} cannot be built by {self.name} for {wanted}: {'; '.join(reasons)}"
            )
        trt, logger = self._api, self._log()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model.SerializeToString()):
            errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise BackendError(f"{self.name} {self.version()} does not take stage {stage.name!r}: {errors[:300]}")
        config = builder.create_builder_config()
        self._target(config, wanted, stage)
        if two_to_four(model):
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
            options["sparse"] = True
        self._profile(builder, config, network, stage)
        if not self._ahead:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        cache = self._timing_cache(config, wanted)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BackendError(
                f"{self.name} {self.version()} cannot build stage {stage.name!r} for compute capability {wanted}: "
                f"{self._logger.last or 'it gives no reason'}"
            )
        _keep(config, cache)
        target = Path(directory) / f"{stage.name}.plan"
        target.write_bytes(bytes(plan))
        if not self._ahead:  # a plan tells of its kernels only where it can be loaded
            target.with_suffix(KERNELS).write_text(self.kernels(bytes(plan), stage))
        return BuiltStage(target.name, {**options, "built_by": self.version()})

    def portable(self, onnx: str | Path, path: str | Path) -> None:
        """Write what is built of `onnx` as a file that other runtimes can run, to be held to full precision by them."""
        Path(path).write_bytes(read(onnx).SerializeToString(deterministic=True))

    def load(self, path: str | Path, stage: StageInterface, options=None, threads: int | None = None) -> TensorRtStage:
        """Ready to run on the GPU.

        Raises:
            BackendError: it was built for another GPU or by another version, or there is no GPU.
        """
        options = options or {}
        if options.get("built_by", self.version()) != self.version():
            raise BackendError(
                f"{path} was built by {self.name} {options['built_by']}, here is {self.version()}; build the bundle "
                "again"
            )
        cuda = self.device()
        here, wanted = cuda.compute_capability(), options.get("compute_capability")
        if wanted is not None and wanted != here:
            raise BackendError(
                f"{path} was built for GPUs of compute capability {wanted}, this one has {here}; build the bundle again"
            )
        return TensorRtStage(self._api, self._engine(Path(path).read_bytes(), str(path)), cuda, stage)

    def kernels(self, plan: bytes, stage: StageInterface) -> str:
        """What the library's engine inspector says of a plan: JSON, `Layers` in the order in which they run, each with
        its type, its tensors' formats and the kernel that was chosen for it; and how long each takes (`engine.kernels`).

        Raises:
            BackendError: the plan cannot be loaded here, or does not run.
        """
        engine = self._engine(plan, "the plan")
        told = json.loads(engine.create_engine_inspector().get_engine_information(self._api.LayerInformationFormat.JSON))
        loaded = TensorRtStage(self._api, engine, self.device(), stage)
        try:
            return json.dumps({**told, MILLISECONDS: loaded.layer_ms(_TIMED_CALLS)})
        finally:
            loaded.close()

    def _engine(self, plan: bytes, what: str):
        self._runtime = self._api.Runtime(self._log())
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{self.name} cannot load {what}: {self._logger.last}; build the bundle again")
        return engine

    def _target(self, config, wanted: str, stage: StageInterface) -> None:
        if not self._ahead:
            if not self.runs_here():
                raise BackendError(f"{self.name} builds on the GPU that runs the engine, and there is none here")
            return
        kind = f"SM{_number(wanted)}"
        known = [name for name in dir(self._api.ComputeCapability) if name.startswith("SM")]
        if kind not in known:
            have = ", ".join(sorted((f"{int(name[2:]) / 10:.1f}" for name in known), key=float))
            raise BackendError(
                f"stage {stage.name!r} cannot be built by {self.name} for compute capability {wanted}; it knows {have}"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(self._api.ComputeCapability, kind), 0)

    def _profile(self, builder, config, network, stage: StageInterface) -> None:
        """Of shapes, where the file leaves any open: those of the stage."""
        shapes = {spec.name: spec.shape for spec in stage.inputs}
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        if any(-1 in tuple(tensor.shape) for tensor in tensors):
            profile = builder.create_optimization_profile()
            for tensor in tensors:
                profile.set_shape(tensor.name, *[shapes[tensor.name]] * 3)
            config.add_optimization_profile(profile)

    def _timing_cache(self, config, wanted: str) -> Path | None:
        """Measurements of kernels from earlier builds for the same GPU, where the library takes any."""
        if self._ahead:  # nothing is measured ahead of time
            return None
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla_edge" / "tensorrt"
        path = base / f"{self.version()}-{wanted}.timing"
        known = path.read_bytes() if path.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
        return path

    def _log(self):
        if self._logger is None:
            base = self._api.ILogger

            class Log(base):
                """Keeps the last error, which is the reason when a build gives nothing."""

                def __init__(self):
                    super().__init__()
                    self.last = ""

                def log(self, severity, message):
                    if severity in (base.ERROR, base.INTERNAL_ERROR):
                        self.last = " ".join(message.split())[:300]

            self._logger = Log()
        return self._logger


class TensorRtStage:
    """A plan on the GPU: one buffer per tensor, one stream, and from the second run on one graph of all kernels."""

    def __init__(self, api, engine, cuda: Cuda, interface: StageInterface):
        self.interface = interface
        self._api, self._engine, self._cuda = api, engine, cuda
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == api.TensorIOMode.INPUT]
        check_tensors(interface, inputs, [name for name in names if name not in inputs])
        specs = {spec.name: spec for spec in (*interface.inputs, *interface.outputs)}
        self._inputs, self._outputs = inputs, [spec.name for spec in interface.outputs]
        self._context = engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"stage {interface.name!r} does not fit into the GPU's memory; use a smaller engine")
        self._stream = cuda.stream()
        self._memory: dict[str, int] = {}
        self._graph = None
        for name in names:
            self._memory[name] = cuda.allocate(max(1, specs[name].zeros().nbytes))
            if name in inputs:
                self._context.set_input_shape(name, specs[name].shape)
            self._context.set_tensor_address(name, self._memory[name])

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = {spec.name: spec.zeros() for spec in self.interface.outputs}
        self.bind({name: np.ascontiguousarray(inputs[name]) for name in self._inputs}, outputs)()
        return outputs

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        given, taken = contiguous(inputs, self._inputs), contiguous(outputs, self._outputs)
        cuda, stream = self._cuda, self._stream

        def step() -> None:
            for name, array in zip(self._inputs, given):
                cuda.copy_in(self._memory[name], array, stream)
            self._launch()
            for name, array in zip(self._outputs, taken):
                cuda.copy_out(array, self._memory[name], stream)
            cuda.wait(stream)

        return step

    def layer_ms(self, calls: int) -> dict[str, float]:
        """Layer -> ms, the median of some calls on zeros. Kernels are launched one by one, not from a graph."""

        class Times(self._api.IProfiler):
            def __init__(self):
                super().__init__()
                self.ms: dict[str, list[float]] = {}

            def report_layer_time(self, layer_name, ms):
                self.ms.setdefault(layer_name, []).append(ms)

        self.run({spec.name: spec.zeros() for spec in self.interface.inputs})  # kernels are prepared in the first
        self._context.profiler = times = Times()
        for _ in range(calls):
            self._enqueue()
            self._cuda.wait(self._stream)
        return {name: statistics.median(ms) for name, ms in times.ms.items()}

    def close(self) -> None:
        """Give the device's memory back."""
        self._graph = None
        while self._memory:
            self._cuda.free(self._memory.popitem()[1])

    def __del__(self):
        if getattr(self, "_memory", None):
            self.close()

    def _launch(self) -> None:
        """All kernels. The first run prepares them, which a capture must not meet; the second is captured."""
        if self._graph is None:
            self._enqueue()
            self._graph = self._capture()
        elif self._graph is False:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)

    def _capture(self):
        self._cuda.wait(self._stream)
        try:
            self._cuda.begin_capture(self._stream)
            captured = self._context.execute_async_v3(self._cuda.handle(self._stream))
            graph = self._cuda.end_capture(self._stream)
        except CudaError:
            return False  # a provider without graphs, or an engine that cannot be captured
        return graph if captured else False

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.handle(self._stream)):
            raise BackendError(f"stage {self.interface.name!r} cannot run on the GPU")


def _number(capability: str) -> int:
    """ "8.7" -> 87. Raises BackendError when it is no capability."""
    major, dot, minor = str(capability).partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise BackendError(f"compute_capability is {capability!r}, allowed is two numbers such as 8.7")
    return int(major + minor)


def _keep(config, path: Path | None) -> None:
    """Write the timing cache where one is kept; a build does not fail for it."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        temporary.replace(path)
    except OSError:
        pass
