"""ONNX Runtime: on the CPU, and on accelerators for which its installed build has an execution provider.

Which of its ways of running a file is fastest depends on the stage and the machine: one thread or all, weights kept
packed or unpacked at load. Inputs of packed 4-bit weights can be rounded to 8 bits (`dynamic: true`): integer products
keep up with the memory where unpacking to float32 does not. Kernels of our own (`own_kernels: true`, see
`engine.native`) do that faster, products with 8-bit weights, and attention in whole numbers. Both round otherwise than
the file asks for; on the CPU none of the other ways changes what is computed beyond the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from vla_edge.engine.backends import (
    BackendError,
    BuiltStage,
    StageInterface,
    beside,
    check_tensors,
    contiguous,
    one_line,
    place,
)
from vla_edge.engine.backends.cpu import sums_saturate, threads_to_use, threads_worth_trying
from vla_edge.engine.native import library
from vla_edge.engine.trace import OPSET

THREADS_AT_LOAD = True
CPU = "CPUExecutionProvider"
# accelerator -> its options; what an accelerator cannot run stays on the CPU
PROVIDERS = {
    "CUDAExecutionProvider": {"cudnn_conv_algo_search": "HEURISTIC"},
    "TensorrtExecutionProvider": {"trt_fp16_enable": "0"},
    "QNNExecutionProvider": {"backend_type": "htp", "htp_performance_mode": "burst"},
}


def version() -> str:
    """Of the runtime."""
    return ort.__version__


def precisions() -> tuple[str, ...]:
    """What it multiplies in on a CPU."""
    return ("float32", "int8", "int4 weights")


def candidates(onnx: str | Path) -> list[dict]:
    """Ways of running the file on the CPU, and on every accelerator this build of the runtime knows."""
    import onnx as format

    from vla_edge.engine.native.rewrite import helps, rounds_inputs

    model = format.load(str(onnx), load_external_data=False)
    found, ways = _as_the_file_says(model.graph), []
    packed = {c.name for c in model.graph.initializer if c.data_type == format.TensorProto.INT4}
    if any(n.op_type == "DequantizeLinear" and n.input[0] in packed for n in model.graph.node):
        ways.append({"dynamic": True})
    if helps(model):
        ways.append({"own_kernels": True} | ({} if rounds_inputs(model) else {"finer": True}))
    found += [{**exact, **way, "exact": False} for exact in found if not exact["fold_weights"] for way in ways]
    present = ort.get_available_providers()
    return found + [{"provider": name, "threads": 1, "exact": False} for name in PROVIDERS if name in present]


def _as_the_file_says(graph) -> list[dict]:
    """The ways that round no more than a file does, the most exact one first."""
    import onnx as format

    operators = {node.op_type for node in graph.node}
    constants = {constant.name for constant in graph.initializer}
    unpacked = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants}
    live = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"} - unpacked
    weight_only = any(
        n.op_type in ("MatMul", "Conv") and n.input[1] in unpacked and n.input[0] not in live for n in graph.node
    )
    folds = [False, True] if weight_only else [False]
    if any(constant.data_type == format.TensorProto.FLOAT8E4M3FN for constant in graph.initializer):
        folds = [True]  # there are no products of FP8 on the CPU; fused ones would be looked for and not found
    # fused into a Gemm, a product with an unquantized bias is no longer recognized as an integer product
    fuse = "QuantizeLinear" not in operators
    return [
        {"threads": threads, "fold_weights": fold, "fuse_bias": fuse}
        for threads in threads_worth_trying() for fold in folds
    ]  # fmt: skip


def build(onnx: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Put the file into `directory`.

    Args:
        options: `threads`, `fold_weights`, `fuse_bias`, `dynamic`, `own_kernels`, `provider`; those not given as in the
            first candidate.

    Raises:
        BackendError: the runtime cannot load the file.
    """
    import onnx as format

    target = place(onnx, directory, stage)
    _unpack_fp4(target)
    first = _as_the_file_says(format.load(str(target), load_external_data=False).graph)[0]
    options = {**first, **(options or {})}
    if options.get("own_kernels"):
        from vla_edge.engine.native.rewrite import use_kernels

        given = beside(target)
        use_kernels(target)
        for name in given - beside(target):
            target.with_name(name).unlink()
    load(target, stage, options)
    return BuiltStage(target.name, options)


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> OnnxRuntimeStage:
    """Ready to run.

    Args:
        threads: at most this many; as built when None.

    Raises:
        BackendError: the runtime refuses the file, its tensors are not those of `stage`, or the accelerator it was
            built for is not here.
    """
    options = dict(options or {})
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = threads_to_use(options.get("threads"), threads)
    session_options.inter_op_num_threads = 1
    session_options.log_severity_level = 3
    # The runtime's own store of memory grows by doubling and gives nothing back: a process with SmolVLA-450M took 761
    # MB with it and 690 without, and calls of small engines at most 3 % longer (measured).
    session_options.enable_cpu_mem_arena = False
    entries = {
        # waiting threads take a core from the controller only while a stage runs
        "session.force_spinning_stop": "1",
        # exact kernels where weights use all 8 bits; those of reduced range keep the fast ones
        "session.x64quantprecision": "1" if gains_by_reduced_range() else "0",
        "session.disable_quant_qdq": "1" if options.get("fold_weights") else "0",
        # 1: packed weights are multiplied with float32 inputs, as the file says; 4: with inputs rounded to int8, each
        # group of channels that shares a scale of the weights with a step of its own
        "session.qdq_matmulnbits_accuracy_level": "4" if options.get("dynamic") else "1",
    }
    if options.get("own_kernels"):
        _register_kernels(session_options, path)
    for key, value in entries.items():
        session_options.add_session_config_entry(key, value)
    # the first drops a ReLU before any rounding whose zero point is 0, which signed FP8 has too (seen with 1.31.1); the
    # kernel of a sum with a norm takes 2 to 3 times as long as both of them alone (48 us and 22 at 92 rows of 256)
    disabled = ["ReluQuantRewrite", "SkipLayerNormFusion"]
    disabled += [] if options.get("fuse_bias", True) else ["MatMulAddFusion"]
    provider = options.get("provider", CPU)
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"stage file {path} is for ONNX Runtime's {provider}, which this build of it lacks (it has "
            f"{', '.join(ort.get_available_providers())}); install the package with it, or build for this computer"
        )
    wanted = [CPU] if provider == CPU else [(provider, PROVIDERS[provider]), CPU]
    try:
        session = ort.InferenceSession(str(path), session_options, providers=wanted, disabled_optimizers=disabled)
    except Exception as error:  # the runtime raises a type of its own for each failure
        raise BackendError(f"ONNX Runtime {version()} cannot load stage file {path}: {one_line(error)}") from error
    if provider not in session.get_providers():  # it goes on silently on the CPU
        raise BackendError(f"ONNX Runtime's {provider} finds no device here for stage file {path}")
    return OnnxRuntimeStage(session, stage)


class OnnxRuntimeStage:
    """One session, behind the stage contract."""

    def __init__(self, session: ort.InferenceSession, interface: StageInterface):
        self.interface = interface
        self._session = session
        self._outputs = [spec.name for spec in interface.outputs]
        # an input that the stage does not depend on is not part of the file
        self._inputs = [value.name for value in session.get_inputs()]
        check_tensors(interface, self._inputs, [value.name for value in session.get_outputs()])

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            values = self._session.run(self._outputs, {name: inputs[name] for name in self._inputs})
        except Exception as error:
            raise BackendError(f"stage {self.interface.name!r} cannot run: {one_line(error)}") from error
        return dict(zip(self._outputs, values))

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        binding = self._session.io_binding()
        held = []
        for names, arrays, attach in (
            (self._inputs, inputs, binding.bind_ortvalue_input),
            (self._outputs, outputs, binding.bind_ortvalue_output),
        ):
            for name, array in zip(names, contiguous(arrays, names)):
                # for the CPU this shares the array's memory
                value = ort.OrtValue.ortvalue_from_numpy(array)
                attach(name, value)
                held.append((value, array))
        session = self._session

        # without options: in any that are given the runtime looks for a GPU's graph, which costs an exception, 75 us
        def step(_held=held) -> None:
            session.run_with_iobinding(binding)

        return step


def gains_by_reduced_range() -> bool:
    """Whether weights of 7 bits are faster than those of 8 here.

    Where sums of products saturate, the runtime has kernels whose sums do not (`session.x64quantprecision`), about 15 %
    slower, for weights that use all 8 bits; with 7 bits the fast ones are exact. Saturated sums gave errors of 15 % on
    SmolVLA's stages, exact ones 1 %.
    """
    return sums_saturate()


def _register_kernels(session_options: ort.SessionOptions, path: str | Path) -> None:
    kernels = library()
    if kernels is None:
        raise BackendError(
            f"stage file {path} is for the package's own kernels, which are not compiled here or not for this "
            "processor; install the package where there is a C compiler, or build for this computer"
        )
    try:
        session_options.register_custom_ops_library(str(kernels))
    except Exception as error:  # a runtime that is too old for it
        reason = one_line(error)
        raise BackendError(f"ONNX Runtime {version()} does not take the package's kernels: {reason}") from error


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
    path.unlink()  # it may share its blocks with the file it was made of
    path.write_bytes(model.SerializeToString(deterministic=True))
