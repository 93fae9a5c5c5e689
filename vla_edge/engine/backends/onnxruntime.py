"""ONNX Runtime on the CPU.

Which of its ways of running a file is fastest depends on the stage and the machine, so `build` measures them: one
thread or all, weights kept packed or unpacked at load, biases fused or not. None of them changes what is computed
beyond the rounding of float32.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface
from vla_edge.engine.trace import OPSET

PROVIDERS = ["CPUExecutionProvider"]
ROUNDS = 15
# The controller needs a core too: twice the threads are worth it when they save at least this share of the time.
SAVING_PER_DOUBLING = 0.2


def version() -> str:
    """Of the runtime."""
    return ort.__version__


def build(onnx: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Put the file into `directory` and find the fastest way of running it here.

    Args:
        options: taken as they are instead of measured: `threads`, `fold_weights`, `fuse_bias`.

    Raises:
        BackendError: the runtime cannot load or run the file.
    """
    target = Path(directory) / f"{stage.name}.onnx"
    if Path(onnx).resolve() != target.resolve():
        shutil.copyfile(onnx, target)
    _unpack_fp4(target)
    candidates = [candidate | dict(options or {}) for candidate in _candidates(target)]
    candidates = [c for i, c in enumerate(candidates) if c not in candidates[:i]]
    if len(candidates) == 1:
        load(target, stage, candidates[0])
        return BuiltStage(target.name, candidates[0])
    milliseconds = _measure([load(target, stage, candidate) for candidate in candidates])
    cost = [ms / (1 - SAVING_PER_DOUBLING) ** np.log2(c["threads"]) for ms, c in zip(milliseconds, candidates)]
    best = int(np.argmin(cost))
    tried = {_label(candidate): round(ms, 3) for candidate, ms in zip(candidates, milliseconds)}
    return BuiltStage(target.name, candidates[best], tried)


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> OnnxRuntimeStage:
    """Ready to run.

    Args:
        threads: at most this many; as built when None.

    Raises:
        BackendError: the runtime refuses the file, or its tensors are not those of `stage`.
    """
    options = dict(options or {})
    wanted = min(options.get("threads", 1), threads or os.cpu_count() or 1, len(os.sched_getaffinity(0)))
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = wanted
    session_options.inter_op_num_threads = 1
    session_options.log_severity_level = 3
    entries = {
        # waiting threads take a core from the controller only while a stage runs
        "session.force_spinning_stop": "1",
        # exact kernels where weights use all 8 bits; those of reduced range keep the fast ones
        "session.x64quantprecision": "1" if gains_by_reduced_range() else "0",
        "session.disable_quant_qdq": "1" if options.get("fold_weights") else "0",
        # multiply packed weights with float32 inputs: the file says so, the runtime's default would round them to int8
        "session.qdq_matmulnbits_accuracy_level": "1",
    }
    for key, value in entries.items():
        session_options.add_session_config_entry(key, value)
    # drops a ReLU before any rounding whose zero point is 0, which signed FP8 has too (seen with 1.31.1)
    disabled = ["ReluQuantRewrite"]
    disabled += [] if options.get("fuse_bias", True) else ["MatMulAddFusion"]
    try:
        session = ort.InferenceSession(str(path), session_options, providers=PROVIDERS, disabled_optimizers=disabled)
    except Exception as error:  # the runtime raises a type of its own for each failure
        raise BackendError(f"ONNX Runtime {version()} cannot load stage file {path}: {_one_line(error)}") from error
    return OnnxRuntimeStage(session, stage)


class OnnxRuntimeStage:
    """One session, behind the stage contract."""

    def __init__(self, session: ort.InferenceSession, interface: StageInterface):
        self.interface = interface
        self._session = session
        self._outputs = [spec.name for spec in interface.outputs]
        # an input that the stage does not depend on is not part of the file
        self._inputs = [value.name for value in session.get_inputs()]
        unknown = set(self._inputs) - {spec.name for spec in interface.inputs}
        missing = set(self._outputs) - {value.name for value in session.get_outputs()}
        if unknown or missing:
            raise BackendError(
                f"the file of stage {interface.name!r} has other tensors than its manifest says "
                f"({', '.join(sorted(unknown | missing))}); build the bundle again"
            )

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            values = self._session.run(self._outputs, {name: inputs[name] for name in self._inputs})
        except Exception as error:
            raise BackendError(f"stage {self.interface.name!r} cannot run: {_one_line(error)}") from error
        return dict(zip(self._outputs, values))

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        binding = self._session.io_binding()
        held = []
        for names, arrays, attach in (
            (self._inputs, inputs, binding.bind_ortvalue_input),
            (self._outputs, outputs, binding.bind_ortvalue_output),
        ):
            for name in names:
                if not arrays[name].flags.c_contiguous:
                    raise ValueError(f"{name} is not contiguous and cannot be bound")
                # for the CPU this shares the array's memory
                value = ort.OrtValue.ortvalue_from_numpy(arrays[name])
                attach(name, value)
                held.append((value, arrays[name]))
        run, session = ort.RunOptions(), self._session

        def step(_held=held) -> None:
            session.run_with_iobinding(binding, run)

        return step


@lru_cache(maxsize=1)
def gains_by_reduced_range() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits, which saturates: x86-64 without VNNI.

    ONNX Runtime then has kernels that do not (`session.x64quantprecision`), about 15 % slower, for weights that use all
    8 bits; with 7 bits the fast ones are exact. Saturated sums gave errors of 15 % on SmolVLA's stages, exact ones 1 %.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return True
    return not flags & {"avx_vnni", "avx512_vnni"}


def _unpack_fp4(path: Path) -> None:
    """Store 4-bit floating point as the 8-bit integers of twice its value, which this runtime can read: the same
    numbers at twice the size."""
    import onnx

    seen = onnx.load(str(path), load_external_data=False).graph.initializer
    if all(constant.data_type != onnx.TensorProto.FLOAT4E2M1 for constant in seen):
        return  # without its constants in memory, which may be large
    model = onnx.load(str(path))
    graph = model.graph
    constants = {constant.name: constant for constant in graph.initializer}
    packed = [
        node for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in constants and constants[node.input[0]].data_type == onnx.TensorProto.FLOAT4E2M1
    ]  # fmt: skip
    makers = {node.output[0]: node for node in graph.node}
    for node in packed:
        maker = makers[node.input[1]]
        scales, whole = (onnx.numpy_helper.to_array(constants[name]).astype(np.float32) for name in maker.input[:2])
        values = 2 * onnx.numpy_helper.to_array(constants[node.input[0]]).astype(np.float32)
        for name, array in ((node.input[0], values.astype(np.int8)), (maker.input[0], scales * whole / 2)):
            constants[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
        node.input[1] = maker.input[0]
        graph.node.remove(maker)
        graph.initializer.remove(constants[maker.input[1]])
    model.opset_import[0].version = OPSET
    model.ir_version = 10
    path.write_bytes(model.SerializeToString(deterministic=True))


def _candidates(path: Path) -> list[dict]:
    """Ways of running the file that are worth a measurement."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    constants = {constant.name for constant in graph.initializer}
    unpacked = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants}
    live = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"} - unpacked
    weight_only = any(n.op_type == "MatMul" and n.input[1] in unpacked and n.input[0] not in live for n in graph.node)
    available = len(os.sched_getaffinity(0))
    threads = [1] if available == 1 else [1, min(available, 8)]
    folds = [False, True] if weight_only else [False]
    if any(constant.data_type == onnx.TensorProto.FLOAT8E4M3FN for constant in graph.initializer):
        folds = [True]  # there are no products of FP8 on the CPU; fused ones would be looked for and not found
    # fused into a Gemm, a product with an unquantized bias is no longer recognized as an integer product
    fusions = [False] if "QuantizeLinear" in operators else [True]
    return [
        {"threads": n, "fold_weights": fold, "fuse_bias": fuse} for n in threads for fold in folds for fuse in fusions
    ]


def _measure(stages: list[OnnxRuntimeStage]) -> list[float]:
    """Milliseconds of each, interleaved so that other load on the machine meets all of them alike."""
    calls = []
    for stage in stages:
        interface = stage.interface
        arrays = {spec.name: spec.zeros() for spec in (*interface.inputs, *interface.outputs)}
        calls.append(stage.bind(arrays, arrays))
    times = np.empty((ROUNDS, len(calls)))
    for row in range(-2, ROUNDS):
        for column, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            if row >= 0:
                times[row, column] = time.perf_counter() - begin
    return (1e3 * np.percentile(times, 25, axis=0)).tolist()


def _label(options: Mapping) -> str:
    words = [f"{options['threads']} thread{'s' if options['threads'] > 1 else ''}"]
    words += ["unpacked weights"] if options.get("fold_weights") else []
    return ", ".join(words)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
