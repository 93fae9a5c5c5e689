"""OpenVINO: on the CPU, and on its other devices where there are any.

It reads the same files. On processors that multiply in bfloat16 it can round the floating-point products of a file to
that (`precision: bf16`), and the inputs of products whose weights alone are quantized to 8 bits (`dynamic: true`): both
faster than the file asks for, less exact, and marked so. Where its sums of 8-bit products would saturate and a file's weights
are large enough for that, they are of float32. Compiled stages of bundles are kept in the user's cache
directory, by their content.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import openvino as ov

from vla_edge.engine.backends import (
    BackendError,
    BuiltStage,
    StageInterface,
    check_tensors,
    contiguous,
    one_line,
    place,
    run_bound,
)
from vla_edge.engine.backends.cpu import sums_saturate, threads_to_use, threads_worth_trying
from vla_edge.engine.manifest import MANIFEST
from vla_edge.files import sha256
from vla_edge.policy.stages import TensorSpec

DEVICE = "CPU"
# channels of an input that are rounded to 8 bits with one step
DYNAMIC_GROUP = 64
MOST_IN_16_BITS = (2**15 - 1) // (2 * 255)


def version() -> str:
    """Of the runtime."""
    return ov.__version__.split("-")[0]


def precisions() -> tuple[str, ...]:
    """What it multiplies in on a CPU of this kind."""
    return ("float32", *(("bfloat16",) if _bfloat16() else ()), "int8", "int4 weights")


def candidates(onnx: str | Path) -> list[dict]:
    """Ways of running the file: threads, bfloat16, inputs rounded to 8 bits; and other devices that are present."""
    import onnx as format

    graph = format.load(str(onnx), load_external_data=False).graph
    constants = {constant.name: constant for constant in graph.initializer}
    packed = any(
        node.op_type == "DequantizeLinear"
        and node.input[0] in constants and constants[node.input[0]].data_type == format.TensorProto.INT4
        for node in graph.node
    )  # fmt: skip
    ways: list[dict] = [{"precision": "f32"}]
    if _bfloat16():
        ways.append({"precision": "bf16", "exact": False})
    if packed:
        ways.append({"precision": "f32", "dynamic": True, "exact": False})
    found = [{"threads": threads, **way} for way in ways for threads in threads_worth_trying()]
    others = [device for device in ov.Core().available_devices if device != DEVICE]
    return found + [{"device": device, "threads": 1, "exact": False} for device in others]


def build(onnx: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Put the file into `directory`.

    Args:
        options: `threads`, `precision` ("f32", "bf16"), `dynamic`, `device`; those not given: float32, one thread.

    Raises:
        BackendError: the runtime cannot compile the file, or would compute something else.
    """
    target = place(onnx, directory, stage)
    _check_groups(target, stage)
    options = {**candidates(target)[0], **(options or {})}
    load(target, stage, options)
    return BuiltStage(target.name, options)


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> OpenVinoStage:
    """Ready to run.

    Args:
        threads: at most this many; as built when None.

    Raises:
        BackendError: the runtime refuses the file, its tensors are not those of `stage`, or the device it was built for
            is not here.
    """
    options = dict(options or {})
    device, core = options.get("device", DEVICE), ov.Core()
    if device not in core.available_devices:
        raise BackendError(
            f"stage file {path} is for OpenVINO's device {device}, and here are {', '.join(core.available_devices)}; "
            "install its driver, or build for this computer"
        )
    properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    if device == DEVICE:
        properties |= {
            "INFERENCE_NUM_THREADS": threads_to_use(options.get("threads"), threads),
            "INFERENCE_PRECISION_HINT": options.get("precision", "f32"),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_GROUP if options.get("dynamic") else 0,
            # a pinned thread would wait behind a controller on the same processor while another one idles
            "ENABLE_CPU_PINNING": False,
        }
    try:
        if device == DEVICE and sums_saturate() and _saturates(path):
            properties["LP_TRANSFORMS_MODE"] = "NO"  # products in float32 then, as exact as the file says
        model = core.compile_model(str(path), device, properties | _cache(Path(path)))
    except Exception as error:
        reason = re.split(r"Check '.*?' failed at \S+:", str(error))[-1]
        raise BackendError(f"OpenVINO {version()} cannot load stage file {path}: {one_line(reason)}") from error
    return OpenVinoStage(model, stage)


class OpenVinoStage:
    """One compiled model, behind the stage contract."""

    def __init__(self, model: ov.CompiledModel, interface: StageInterface):
        self.interface = interface
        self._model = model
        # an input that the stage does not depend on is not part of the file
        self._inputs = _names(model.inputs, interface.inputs)
        found = _names(model.outputs, interface.outputs)
        check_tensors(interface, self._inputs, found)
        self._outputs = [spec.name for spec in interface.outputs]
        self._ports = [found.index(name) for name in self._outputs]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_bound(self, inputs, self._inputs)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        request = self._model.create_infer_request()
        given, taken = contiguous(inputs, self._inputs), contiguous(outputs, self._outputs)
        for index, array in enumerate(given):
            request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))
        for port, array in zip(self._ports, taken):
            request.set_output_tensor(port, ov.Tensor(array, shared_memory=True))

        # the request knows the arrays' memory and does not keep it alive
        def step(_held=(given, taken)) -> None:
            request.start_async()
            request.wait()

        return step


def _saturates(path: str | Path) -> bool:
    """Whether products with the file's 8-bit inputs and weights may not fit into 16 bits, two at a time: a bundle built on a
    processor whose sums do not saturate, or with `reduce_range: false`."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    if not any(node.op_type == "QuantizeLinear" for node in graph.node):
        return False
    weights = (c for c in graph.initializer if c.data_type == onnx.TensorProto.INT8 and len(c.dims) > 1)
    return any(
        np.abs(onnx.numpy_helper.to_array(c, str(Path(path).parent)).astype(np.int16)).max(initial=0) > MOST_IN_16_BITS
        for c in weights
    )


def gains_by_reduced_range() -> bool:
    """Whether weights of 7 bits are more exact than those of 8 here."""
    return sums_saturate()


def _cache(path: Path) -> dict:
    """Where the compiled model is kept for the next start, if `path` is part of a finished bundle.

    By content: the runtime itself tells files apart by path, size and second.
    """
    if not (path.parent / MANIFEST).is_file():
        return {}
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "vla_edge" / "openvino" / sha256(path)[:16]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return {"CACHE_DIR": str(directory)}


def _check_groups(path: Path, stage: StageInterface) -> None:
    """4-bit weights in groups of an odd size are computed wrongly, without a word (seen with 2026.4.1)."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    types = {constant.name: constant.data_type for constant in graph.initializer}
    for node in graph.node:
        size = next((attribute.i for attribute in node.attribute if attribute.name == "block_size"), 0)
        if node.op_type == "DequantizeLinear" and size % 2 and types.get(node.input[0]) == onnx.TensorProto.INT4:
            raise BackendError(
                f"stage {stage.name!r} has 4-bit weights {node.input[0]!r} in groups of {size}, and OpenVINO computes "
                "groups of an odd size wrongly; choose a group_size that divides the layer, or another backend"
            )


@lru_cache(maxsize=1)
def _bfloat16() -> bool:
    return "BF16" in ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def _names(ports, wanted: Sequence[TensorSpec]) -> list[str]:
    """Of each port the name that the stage gives it: a tensor that is merged with another has both names."""
    known = {spec.name for spec in wanted}
    return [next(iter(known & port.get_names()), port.get_any_name()) for port in ports]
