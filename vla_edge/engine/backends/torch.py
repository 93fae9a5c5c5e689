"""PyTorch: eager in full precision, the reference that every build is compared with; and a backend of bundles.

As a backend it reads the stage's file (see `onnx_torch`) and runs it eagerly or through `torch.compile`, in float32 or
with products in bfloat16, on the CPU or on a CUDA or ROCm device, there as one graph of kernels. Compiled code is made
on the machine that runs it, never shipped. Its OpenMP threads wait by spinning unless OMP_WAIT_POLICY is PASSIVE when
the process starts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface, contiguous, place, run_bound
from vla_edge.engine.backends.cpu import threads_to_use, threads_worth_trying
from vla_edge.policy.products import bfloat16_gain
from vla_edge.policy.stages import Stage

WARM_UPS = 3


def version() -> str:
    """Of the library."""
    return torch.__version__


def precisions() -> tuple[str, ...]:
    """What it multiplies in on a CPU; packed weights are unpacked when a stage is loaded."""
    return ("float32", "bfloat16")


def candidates(onnx: str | Path) -> list[dict]:
    """Eager, in float32 and bfloat16; compiled where there is a C++ compiler; on a CUDA device where there is one.

    A processor without instructions for bfloat16 takes up to hundreds of times as long in it: not tried there.
    """
    threads = threads_worth_trying()
    ways: list[dict] = [{}]
    if bfloat16_gain() > 1:
        ways.append({"precision": "bf16", "exact": False})
    found = [{"threads": number, **way} for way in ways for number in threads]
    if shutil.which("g++") or shutil.which("clang++"):  # for all threads only: compiling takes most of a minute
        found += [{"threads": threads[-1], "compile": True, **way} for way in ways]
    if torch.cuda.is_available():
        found.append({"device": "cuda", "threads": 1, "precision": "bf16", "exact": False})
    return found


def build(onnx: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Put the file into `directory`.

    Args:
        options: `threads`, `compile`, `precision` ("f32", "bf16"), `device`; by default eager, float32, one thread.

    Raises:
        BackendError: the file holds an operator that is not known here.
    """
    target = place(onnx, directory, stage)
    options = {"threads": 1, **(options or {})}
    load(target, stage, options)
    return BuiltStage(target.name, options)


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> TorchFileStage:
    """Ready to run.

    Args:
        threads: at most this many; as built when None.

    Raises:
        BackendError: the file cannot be read, its tensors are not those of `stage`, or the device is not here.
    """
    from vla_edge.engine.backends.onnx_torch import read_module

    options = dict(options or {})
    device = options.get("device", "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendError(
            f"stage file {path} is for PyTorch's device {device!r}, which is not here; build for this computer"
        )
    module = read_module(path, stage).to(device)
    if options.get("compile"):
        module = torch.compile(module, dynamic=False)
    number = threads_to_use(options.get("threads"), threads)
    return TorchFileStage(stage, module, device, options.get("precision") == "bf16", number)


class TorchStage:
    """One stage of a policy, run eagerly."""

    def __init__(self, stage: Stage):
        self.interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        self._module = stage.module.eval()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arguments = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in self.interface.inputs]
        values = self._compute(arguments)
        return {spec.name: value.contiguous().numpy() for spec, value in zip(self.interface.outputs, values)}

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        arguments = [torch.from_numpy(inputs[spec.name]) for spec in self.interface.inputs]
        results = [torch.from_numpy(outputs[spec.name]) for spec in self.interface.outputs]

        def step() -> None:
            for result, value in zip(results, self._compute(arguments)):
                result.copy_(value)

        return step

    def _compute(self, arguments) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            return self._module(*arguments)


class TorchFileStage:
    """A stage read from its file.

    Args:
        device: "cpu" or "cuda". bfloat16: whether products are rounded to it. threads: on the CPU.
    """

    def __init__(self, interface: StageInterface, module, device: str, bfloat16: bool, threads: int):
        self.interface = interface
        self._module, self._device, self._bfloat16, self._threads = module, device, bfloat16, threads

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_bound(self, inputs, [spec.name for spec in self.interface.inputs])

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        arguments = [torch.from_numpy(a) for a in contiguous(inputs, [spec.name for spec in self.interface.inputs])]
        results = [torch.from_numpy(a) for a in contiguous(outputs, [spec.name for spec in self.interface.outputs])]
        if self._device != "cpu":
            return self._bind_graph(arguments, results)

        def step() -> None:
            before = torch.get_num_threads()
            if before != self._threads:
                torch.set_num_threads(self._threads)
            try:
                for result, value in zip(results, self._compute(arguments)):
                    result.copy_(value)
            finally:
                if before != self._threads:
                    torch.set_num_threads(before)

        return step

    def _bind_graph(self, arguments, results) -> Callable[[], None]:
        """On the device: all kernels of the stage are launched as one graph, captured here."""
        held = [argument.to(self._device) for argument in arguments]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._compute(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values = self._compute(held)

        def step() -> None:
            for target, source in zip(held, arguments):
                target.copy_(source)
            graph.replay()
            for result, value in zip(results, values):
                result.copy_(value)

        return step

    def _compute(self, arguments) -> tuple[torch.Tensor, ...]:
        # no_grad, since compiled code refuses inference tensors made elsewhere
        with torch.no_grad(), torch.autocast(self._device, torch.bfloat16, enabled=self._bfloat16):
            return self._module(*arguments)


def gains_by_reduced_range() -> bool:
    """Never: weights are multiplied unpacked."""
    return False


def load_stages(policy) -> dict[str, TorchStage]:
    """Name -> stage of a loaded policy."""
    return {stage.name: TorchStage(stage) for stage in policy.stages()}
