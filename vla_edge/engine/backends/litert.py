"""LiteRT, formerly TensorFlow Lite: stages compiled ahead of time for a small runtime on phones and boards of Arm.

The stage's file is read as the PyTorch backend reads it (see `onnx_torch`) and converted by litert-torch; a robot that
runs the engine needs ai-edge-litert alone. Products run in XNNPACK. Packed weights are unpacked when it is built: a
`.tflite` file is as large as float32, whatever the recipe.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface, contiguous, one_line, run_bound
from vla_edge.engine.backends.cpu import threads_to_use, threads_worth_trying
from vla_edge.files import sha256
from vla_edge.policy.stages import TensorSpec


def version() -> str:
    """Of the runtime."""
    return package_version("ai-edge-litert")


def precisions() -> tuple[str, ...]:
    """What it multiplies in; packed weights are unpacked when a stage is built."""
    return ("float32",)


def candidates(onnx: str | Path) -> list[dict]:
    """Threads."""
    return [{"threads": threads} for threads in threads_worth_trying()]


def gains_by_reduced_range() -> bool:
    """Never: weights are multiplied unpacked."""
    return False


def build(onnx: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Convert the file into `directory`.

    Args:
        options: `threads`; by default one.

    Raises:
        BackendError: litert-torch is missing, or the file holds what it cannot convert.
    """
    target = Path(directory) / f"{stage.name}.tflite"
    target.unlink(missing_ok=True)
    target.write_bytes(_converted(Path(onnx), sha256(Path(onnx)), stage))
    options = {**candidates(onnx)[0], **(options or {})}
    load(target, stage, options)
    return BuiltStage(target.name, options)


@lru_cache(maxsize=1)  # converting takes most of a minute, and is the same for every number of threads
def _converted(onnx: Path, content: str, stage: StageInterface) -> bytes:
    """The file as LiteRT's; `content` is what tells it from one of that name before."""
    try:
        import litert_torch
        import torch
    except ImportError as error:
        raise BackendError(
            f"building for LiteRT needs the package litert-torch, which cannot be imported here ({error}); install it "
            "with pip install litert-torch"
        ) from error
    from vla_edge.engine.backends.onnx_torch import in_float32, read_module

    module = in_float32(read_module(onnx, stage))
    examples = tuple(torch.from_numpy(spec.zeros()) for spec in stage.inputs)
    try:
        # it tells of its passes on standard output, and the libraries of each other
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.TemporaryDirectory() as directory,
        ):
            warnings.simplefilter("ignore")
            target = Path(directory) / "stage.tflite"
            litert_torch.convert(module.eval(), examples).export(str(target))
            return target.read_bytes()
    except Exception as error:  # each pass raises its own kind
        raise BackendError(
            f"litert-torch {package_version('litert-torch')} cannot convert stage file {onnx}: {one_line(error)}"
        ) from error


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> LiteRtStage:
    """Ready to run.

    Args:
        threads: at most this many; as built when None.

    Raises:
        BackendError: the file cannot be read, or its tensors are not those of `stage`.
    """
    number = threads_to_use((options or {}).get("threads"), threads)
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=number)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"LiteRT {version()} cannot load stage file {path}: {one_line(error)}") from error
    return LiteRtStage(interpreter, stage)


class LiteRtStage:
    """One interpreter, behind the stage contract."""

    def __init__(self, interpreter: Interpreter, interface: StageInterface):
        self.interface = interface
        self._interpreter = interpreter
        signature = interpreter.get_signature_runner()
        # an input that the stage does not depend on is not part of the file
        self._inputs = _tensors(signature.get_input_details(), interface, interface.inputs)
        self._outputs = _tensors(signature.get_output_details(), interface, interface.outputs)
        if len(self._outputs) != len(interface.outputs):
            raise _other_tensors(interface)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_bound(self, inputs, list(self._inputs))

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        given = list(zip(self._views(self._inputs), contiguous(inputs, list(self._inputs))))
        taken = list(zip(self._views(self._outputs), contiguous(outputs, list(self._outputs))))

        def step() -> None:
            for view, array in given:
                view()[...] = array  # token ids become 32-bit integers
            self._interpreter.invoke()
            for view, array in taken:
                array[...] = view()

        return step

    def _views(self, tensors: Mapping[str, int]) -> list[Callable[[], np.ndarray]]:
        """Of the runtime's own memory, made anew for each use: it may move when the stage runs."""
        return [self._interpreter.tensor(index) for index in tensors.values()]


def _tensors(details: Mapping, interface: StageInterface, specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Name of the stage's tensor -> index in the file, where tensors are called by their place.

    Raises:
        BackendError: the file's are others.
    """
    found = {}
    for name, detail in details.items():
        place = int(re.sub(r"\D", "", name) or 0)
        if place >= len(specs) or tuple(detail["shape"]) != specs[place].shape:
            raise _other_tensors(interface)
        found[specs[place].name] = detail["index"]
    return found


def _other_tensors(interface: StageInterface) -> BackendError:
    return BackendError(
        f"the file of stage {interface.name!r} has other tensors than its manifest says; build the bundle again"
    )
