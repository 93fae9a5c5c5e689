"""Core ML: stages written for Apple's computers. coremltools writes them anywhere; what it writes runs on macOS alone.

The stage's file is read as the PyTorch backend reads it (see `onnx_torch`) and converted into an ML Program in float32,
which Core ML runs on the processor and the GPU. A package is a directory; the bundle holds it as one zip archive, not
compressed. Packed weights are unpacked: it is as large as float32, whatever the recipe.
"""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import coremltools as ct
import numpy as np

from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface, contiguous, one_line, run_bound, share

MOST_DIMENSIONS = 5  # of a tensor in Core ML
_PROGRAM = "com.apple.CoreML"  # folder of a package's Data
_SUFFIX = ".mlpackage"


def version() -> str:
    """Of coremltools."""
    return ct.__version__


def precisions() -> tuple[str, ...]:
    """What it multiplies in; packed weights are unpacked when a stage is built."""
    return ("float32",)


def runs_here() -> bool:
    """Whether this is macOS."""
    return platform.system() == "Darwin"


def candidates(onnx: str | Path) -> list[dict]:
    """One way: Core ML itself chooses what runs where."""
    return [{"threads": 1}]


def gains_by_reduced_range() -> bool:
    """Never: weights are multiplied unpacked."""
    return False


def portable(onnx: str | Path, path: str | Path) -> None:
    """What is built of `onnx` as a file for other runtimes: the same, all products in float32."""
    share(onnx, Path(path))


def build(onnx: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Convert the file into `directory`, and check what was written.

    Raises:
        BackendError: the file holds what coremltools cannot convert, or what Core ML would not take.
    """
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / f"{stage.name}{_SUFFIX}"
        try:
            model = _converted(onnx, stage)
            model.save(str(package))
        except BackendError:
            raise
        except Exception as error:  # each pass raises its own kind
            reason = f"coremltools {version()} cannot convert stage file {onnx}: {one_line(error)}"
            raise BackendError(reason) from error
        check_package(package, stage)
        target = Path(directory) / f"{package.name}.zip"
        target.unlink(missing_ok=True)
        with zipfile.ZipFile(target, "w") as archive:
            for file in sorted(path for path in package.rglob("*") if path.is_file()):
                # of a fixed date, so that the same package makes the same file
                name = zipfile.ZipInfo(file.relative_to(package.parent).as_posix())
                archive.writestr(name, file.read_bytes())
    return BuiltStage(target.name, {**candidates(onnx)[0], **(options or {})})


def _converted(onnx: str | Path, stage: StageInterface):
    """The file as an `MLModel`. Tensors are called by their place: Core ML keeps names such as `state` for itself."""
    import torch

    from vla_edge.engine.backends.onnx_torch import in_float32, read_module

    module = in_float32(read_module(onnx, stage)).eval()
    for place, node in enumerate(node for node in module.graph.nodes if node.op == "placeholder"):
        node.target = node.name = f"input_{place}"
    module.recompile()
    examples = tuple(torch.from_numpy(spec.zeros()) for spec in stage.inputs)
    loud, quiet = io.StringIO(), logging.getLogger("coremltools")
    before = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(loud), torch.no_grad():
            warnings.simplefilter("ignore")  # of the libraries, about each other
            return ct.convert(
                torch.export.export(module, examples).run_decompositions({}),
                convert_to="mlprogram",
                outputs=[ct.TensorType(name=f"output_{place}") for place in range(len(stage.outputs))],
                compute_precision=ct.precision.FLOAT32,
                minimum_deployment_target=ct.target.macOS15,
                skip_model_load=True,
            )
    finally:
        quiet.setLevel(before)


def check_package(package: Path, stage: StageInterface) -> None:
    """Nothing, when a package holds a program that Core ML can be `stage` with; what can be told without running it.

    Raises:
        BackendError: its tensors are not the stage's, one has too many dimensions, or a constant lies outside its file.
    """
    spec = ct.utils.load_spec(str(package))
    for kind, features, wanted in (
        ("input", spec.description.input, stage.inputs),
        ("output", spec.description.output, stage.outputs),
    ):
        found = {feature.name: tuple(feature.type.multiArrayType.shape) for feature in features}
        if found != {f"{kind}_{place}": tensor.shape for place, tensor in enumerate(wanted)}:
            raise BackendError(f"the Core ML package of stage {stage.name!r} has other {kind}s than the stage: {found}")
    function = spec.mlProgram.functions["main"]
    weights = package / "Data" / _PROGRAM / "weights" / "weight.bin"
    size = weights.stat().st_size if weights.is_file() else 0
    for operation in function.block_specializations[function.opset].operations:
        for output in operation.outputs:
            if output.type.tensorType.rank > MOST_DIMENSIONS:
                raise BackendError(
                    f"stage {stage.name!r} has a tensor of {output.type.tensorType.rank} dimensions "
                    f"({operation.type}), and Core ML takes {MOST_DIMENSIONS} at most"
                )
        for value in operation.attributes.values():
            if value.WhichOneof("value") == "blobFileValue" and not value.blobFileValue.offset < size:
                raise BackendError(f"a constant of the Core ML package of stage {stage.name!r} lies outside its file")


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> CoreMlStage:
    """Ready to run, on macOS.

    Raises:
        BackendError: this is another system, or the file cannot be read.
    """
    if not runs_here():
        raise BackendError(f"stage file {path} is for Core ML, which runs on macOS, and this is {platform.system()}")
    home = tempfile.TemporaryDirectory(prefix="vla-edge-coreml-")
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(home.name)
        package = Path(home.name) / f"{stage.name}{_SUFFIX}"
        check_package(package, stage)
        model = ct.models.MLModel(str(package))
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"Core ML cannot load stage file {path}: {one_line(error)}") from error
    return CoreMlStage(model, stage, home)


class CoreMlStage:
    """One model, behind the stage contract.

    Args:
        home: the directory of its package, which lasts as long as the stage.
    """

    def __init__(self, model, interface: StageInterface, home):
        self.interface = interface
        self._model, self._home = model, home
        integers = ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32
        self._types = [
            np.int32 if feature.type.multiArrayType.dataType == integers else np.float32
            for feature in model.get_spec().description.input
        ]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_bound(self, inputs, [spec.name for spec in self.interface.inputs])

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        given = contiguous(inputs, [spec.name for spec in self.interface.inputs])
        taken = contiguous(outputs, [spec.name for spec in self.interface.outputs])

        def step() -> None:
            tensors = {f"input_{i}": array.astype(kind) for i, (array, kind) in enumerate(zip(given, self._types))}
            values = self._model.predict(tensors)
            for place, array in enumerate(taken):
                array[...] = np.reshape(values[f"output_{place}"], array.shape)

        return step
