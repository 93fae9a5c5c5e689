"""Runtimes behind the stage contract, one file each; each is imported only when it is asked for.

A backend module offers

    version() -> str
    precisions() -> tuple[str, ...]                         what it multiplies in on this computer, for `overview`
    candidates(onnx) -> list[dict]                          options worth a measurement; the first is the most exact
    build(onnx, directory, stage, options) -> BuiltStage    compile one stage into `directory`
    load(path, stage, options, threads) -> LoadedStage      ready to run
    gains_by_reduced_range() -> bool                        whether 7-bit weights are faster than 8-bit ones here

and one that reads another kind of file than ONNX also

    READS: str                                              its suffix, see `FORMATS`

and one whose files are the same for any number of threads also

    THREADS_AT_LOAD = True                                  so that one file serves contenders that differ in them

and one that can compile for a device that is not here also

    runs_here() -> bool                                     whether its device is
    portable(onnx, path)                                    write what it computes as a file for other runtimes

Options are plain types and travel in the manifest. `threads` says how many; `exact: False` marks one that rounds more
than the file asks for (a product in bfloat16), which a build takes only where it passes verification.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from vla_edge.policy.stages import TensorSpec
from vla_edge.types import VlaEdgeError

# name -> (module, what to install)
BACKENDS = {
    "onnxruntime": ("vla_edge.engine.backends.onnxruntime", "onnxruntime"),
    "openvino": ("vla_edge.engine.backends.openvino", "openvino"),
    "torch": ("vla_edge.engine.backends.torch", "torch"),
    "llama_cpp": ("vla_edge.engine.backends.llama_cpp", "llama-cpp-python"),
    "executorch": ("vla_edge.engine.backends.executorch", "executorch"),
    "litert": ("vla_edge.engine.backends.litert", "ai-edge-litert"),
    "mlx": ("vla_edge.engine.backends.mlx", "mlx"),
    "coreml": ("vla_edge.engine.backends.coreml", "coremltools"),
    "tensorrt": ("vla_edge.engine.backends.tensorrt", "tensorrt"),
    "tensorrt_rtx": ("vla_edge.engine.backends.tensorrt_rtx", "tensorrt-rtx"),
}
AUTO = "auto"
# suffix of a stage's file -> what it is
FORMATS = {".onnx": "ONNX", ".gguf": "GGUF, which the stage that writes all tokens of a policy is exported as"}
# What `auto` chooses from. PyTorch is asked for by name: importing it alone takes longer than starting an engine.
MEASURED = ("onnxruntime", "openvino")


class BackendError(VlaEdgeError):
    """A runtime that is unknown or not installed, or a stage that it cannot build, load or run."""


@dataclass(frozen=True)
class StageInterface:
    """What a backend knows of a stage besides its file: the name and the tensors, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class BuiltStage:
    """One compiled stage.

    Attributes:
        file: its name within the bundle.
        options: what `load` has to be told, plain types.
    """

    file: str
    options: Mapping = field(default_factory=dict)


class LoadedStage(Protocol):
    """A stage that runs."""

    interface: StageInterface

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named arrays in, freshly allocated named arrays out."""

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """A call that reads `inputs` and overwrites `outputs` in place, without allocating where the runtime allows."""


def get_backend(name: str) -> ModuleType:
    """The module of backend `name`.

    Raises:
        BackendError: there is none of that name, or its runtime is not installed.
    """
    if name not in BACKENDS:
        from vla_edge.engine.packed_layers import LAYOUTS

        others = f" (vla-edge export writes {name}'s files, which its own runtime runs)" if name in LAYOUTS else ""
        raise BackendError(f"there is no backend {name!r}{others}; choose one of {', '.join(sorted(BACKENDS))}")
    module, package = BACKENDS[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"backend {name!r} needs the package {package}, which cannot be imported here ({error}); "
            f"install it with pip install {package}"
        ) from error


def chosen_backends(wanted: str) -> tuple[str, ...]:
    """The backends that "auto", a name, or names with commas between them stand for.

    Raises:
        BackendError: one of them is unknown or not installed; for "auto", that none is.
    """
    if wanted != AUTO:
        names = tuple(dict.fromkeys(name.strip() for name in wanted.split(",")))
        for name in names:
            get_backend(name)
        return names
    problems, names = [], []
    for name in MEASURED:
        try:
            get_backend(name)
            names.append(name)
        except BackendError as error:
            problems.append(str(error))
    if not names:
        raise BackendError(f"no runtime is installed that an engine could be built for: {problems[0]}")
    return tuple(names)


def gain_by_reduced_range(names: Sequence[str]) -> bool:
    """Whether weights of 7 bits are worth it for one of these backends."""
    return any(get_backend(name).gains_by_reduced_range() for name in names)


def runs_here(name: str) -> bool:
    """Whether what backend `name` builds can be run on this computer."""
    return getattr(get_backend(name), "runs_here", lambda: True)()


def reads(runtime: ModuleType) -> str:
    """The suffix of the files that a backend's module takes."""
    return getattr(runtime, "READS", ".onnx")


def place(onnx: str | Path, directory: str | Path, stage: StageInterface) -> Path:
    """The stage's file in `directory`, with the constants beside it, sharing blocks where the file system allows."""
    target = Path(directory) / f"{stage.name}.onnx"
    share(onnx, target)
    for name in beside(onnx):
        share(Path(onnx).with_name(name), target.with_name(name))
    return target


def share(file: str | Path, target: Path) -> None:
    """`target` with the content of `file`, and its blocks where the file system allows."""
    if Path(file).resolve() == target.resolve():
        return
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def beside(onnx: str | Path) -> set[str]:
    """Names of the files that hold large constants of a stage's file, see `export.ConstantStore`."""
    import onnx as format

    model = format.load(str(onnx), load_external_data=False)
    return {
        entry.value
        for constant in model.graph.initializer
        if constant.data_location == format.TensorProto.EXTERNAL
        for entry in constant.external_data
        if entry.key == "location"
    }


def check_tensors(stage: StageInterface, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Nothing, when a file with these tensors can be `stage`; it may lack inputs that the stage does not depend on.

    Raises:
        BackendError: which tensors differ.
    """
    unknown = set(inputs) - {spec.name for spec in stage.inputs}
    missing = {spec.name for spec in stage.outputs} - set(outputs)
    if unknown or missing:
        raise BackendError(
            f"the file of stage {stage.name!r} has other tensors than its manifest says "
            f"({', '.join(sorted(unknown | missing))}); build the bundle again"
        )


def contiguous(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """Those arrays, in order, which a stage is to be bound to.

    Raises:
        ValueError: one is not contiguous.
    """
    for name in names:
        if not arrays[name].flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous and cannot be bound")
    return [arrays[name] for name in names]


def run_bound(stage: LoadedStage, inputs: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """What `stage` makes of the inputs of those names, through its own `bind`.

    Raises:
        BackendError: an input is missing, or the runtime fails.
    """
    try:
        outputs = {spec.name: spec.zeros() for spec in stage.interface.outputs}
        stage.bind({name: np.ascontiguousarray(inputs[name]) for name in names}, outputs)()
    except (RuntimeError, KeyError) as error:
        raise BackendError(f"stage {stage.interface.name!r} cannot run: {one_line(error)}") from error
    return outputs


def one_line(error: Exception) -> str:
    """A runtime's message, short enough for a sentence."""
    return " ".join(str(error).split())[:300]
