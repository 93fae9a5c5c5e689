"""ExecuTorch: stages compiled ahead of time for a small runtime, their products in XNNPACK; made for Arm processors.

The stage's file is read as the PyTorch backend reads it (see `onnx_torch`), exported and lowered; what XNNPACK does not
take runs in ExecuTorch's own kernels. Packed weights are unpacked when it is built: a `.pte` file is as large as float32,
whatever the recipe.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Method, Runtime, Verification

from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface, contiguous, one_line, run_bound
from vla_edge.engine.backends.cpu import threads_to_use, threads_worth_trying

_chosen: list[int] = []  # the threads of this process's pool, once a stage is loaded


def version() -> str:
    """Of the runtime."""
    return package_version("executorch")


def precisions() -> tuple[str, ...]:
    """What it multiplies in; packed weights are unpacked when a stage is built."""
    return ("float32",)


def candidates(onnx: str | Path) -> list[dict]:
    """All processors: the threads are those of the process, not of a stage."""
    return [{"threads": threads_worth_trying()[-1]}]


def gains_by_reduced_range() -> bool:
    """Never: weights are multiplied unpacked."""
    return False


def build(onnx: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Lower the file into `directory`.

    Args:
        options: `threads`; by default all processors.

    Raises:
        BackendError: the file holds what cannot be exported or lowered.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from vla_edge.engine.backends.onnx_torch import read_module

    module = read_module(onnx, stage)
    examples = tuple(torch.from_numpy(spec.zeros()) for spec in stage.inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the libraries, about each other
            program = torch.export.export(module, examples)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # each pass raises its own kind
        raise BackendError(f"ExecuTorch {version()} cannot lower stage file {onnx}: {one_line(error)}") from error
    target = Path(directory) / f"{stage.name}.pte"
    target.unlink(missing_ok=True)
    with open(target, "wb") as file:
        lowered.write_to_file(file)
    options = {**candidates(onnx)[0], **(options or {})}
    load(target, stage, options)
    return BuiltStage(target.name, options)


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> ExecuTorchStage:
    """Ready to run.

    Args:
        threads: at most this many; as built when None. The first stage of a process decides for all.

    Raises:
        BackendError: the file cannot be read, or its tensors are not those of `stage`.
    """
    _choose_threads(threads_to_use((options or {}).get("threads"), threads))
    try:
        program = Runtime.get().load_program(Path(path), verification=Verification.InternalConsistency)
        method = program.load_method("forward")
    except Exception as error:
        raise BackendError(f"ExecuTorch {version()} cannot load stage file {path}: {one_line(error)}") from error
    if method is None:
        raise BackendError(f"stage file {path} has no method 'forward'; build the bundle again")
    return ExecuTorchStage(program, method, stage)


def _choose_threads(threads: int) -> None:
    """Only once: stages that were loaded before hold a pointer to the pool."""
    if not _chosen:
        portable_lib._unsafe_reset_threadpool(threads)
        _chosen.append(threads)


class ExecuTorchStage:
    """One lowered stage, behind the stage contract."""

    def __init__(self, program, method: Method, interface: StageInterface):
        self.interface = interface
        self._program, self._method = program, method  # the method reads from the program's memory
        meta = method.metadata
        found = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]
        given = [tuple(meta.output_tensor_meta(i).sizes()) for i in range(meta.num_outputs())]
        if found != [spec.shape for spec in interface.inputs] or given != [spec.shape for spec in interface.outputs]:
            raise BackendError(
                f"the file of stage {interface.name!r} has tensors of other shapes than its manifest says; "
                "build the bundle again"
            )

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_bound(self, inputs, [spec.name for spec in self.interface.inputs])

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        arguments = [torch.from_numpy(a) for a in contiguous(inputs, [spec.name for spec in self.interface.inputs])]
        results = [torch.from_numpy(a) for a in contiguous(outputs, [spec.name for spec in self.interface.outputs])]

        def step() -> None:
            for result, value in zip(results, self._method.execute(arguments)):
                result.copy_(value)

        return step
