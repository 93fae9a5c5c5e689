"""MLX: Apple's computers, on their GPU and CPU; its build for Linux runs on a processor.

It reads the stage's file (see `onnx_mlx`). Weights of 8 bits, and of 4 bits in groups of 32, 64 or 128, are multiplied
packed. Its threads on a processor are the process's, whatever a bundle says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version as package_version
from pathlib import Path

import mlx.core as mx
import numpy as np

from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface, contiguous, place, run_bound


def version() -> str:
    """Of the library."""
    return package_version("mlx")


def precisions() -> tuple[str, ...]:
    """What it multiplies in."""
    return ("float32", "int8 weights", "int4 weights")


def candidates(onnx: str | Path) -> list[dict]:
    """The processor; the GPU where there is one."""
    return [{"threads": 1}] + ([{"device": "gpu", "threads": 1, "exact": False}] if mx.is_available(mx.gpu) else [])


def gains_by_reduced_range() -> bool:
    """Never: packed weights are multiplied with inputs in float32."""
    return False


def build(onnx: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Put the file into `directory`.

    Args:
        options: `device` ("cpu", "gpu"); by default the processor.

    Raises:
        BackendError: the file holds an operator that is not known here.
    """
    target = place(onnx, directory, stage)
    options = {**candidates(target)[0], **(options or {})}
    # the table of operators is gone through only when the stage runs
    load(target, stage, options).run({spec.name: spec.zeros() for spec in stage.inputs})
    return BuiltStage(target.name, options)


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> MlxStage:
    """Ready to run.

    Raises:
        BackendError: the file cannot be read, its tensors are not those of `stage`, or the device is not here.
    """
    from vla_edge.engine.backends.onnx_mlx import read_function

    device = (options or {}).get("device", "cpu")
    if device == "gpu" and not mx.is_available(mx.gpu):
        raise BackendError(f"stage file {path} is for MLX's device 'gpu', which is not here; build for this computer")
    with mx.stream(mx.Device(getattr(mx, device))):
        function, names = read_function(path, stage)
    return MlxStage(stage, function, names, mx.Device(getattr(mx, device)))


class MlxStage:
    """A stage read from its file.

    Args:
        function: of MLX arrays, in the order of `names`.
    """

    def __init__(self, interface: StageInterface, function: Callable, names: list[str], device: mx.Device):
        self.interface = interface
        self._function, self._names, self._device = function, names, device

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_bound(self, inputs, self._names)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        given = contiguous(inputs, self._names)
        taken = contiguous(outputs, [spec.name for spec in self.interface.outputs])

        def step() -> None:
            try:
                with mx.stream(self._device):
                    values = self._function(*(mx.array(array) for array in given))
                    mx.eval(values)
            except ValueError as error:  # of shapes that do not fit
                raise RuntimeError(str(error)) from error
            for array, value in zip(taken, values):
                array[...] = np.asarray(value)

        return step
