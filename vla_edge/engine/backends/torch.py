"""PyTorch eager in full precision: the reference that every build is compared with.

Not a backend of bundles: it runs the stages of a loaded checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from vla_edge.engine.backends import StageInterface
from vla_edge.policy.stages import Stage


def version() -> str:
    """Of the library."""
    return torch.__version__


class TorchStage:
    """One stage of a policy, run eagerly."""

    def __init__(self, stage: Stage):
        self.interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        self._module = stage.module.eval()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arguments = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in self.interface.inputs]
        with torch.inference_mode():
            values = self._module(*arguments)
        return {spec.name: value.contiguous().numpy() for spec, value in zip(self.interface.outputs, values)}

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        arguments = [torch.from_numpy(inputs[spec.name]) for spec in self.interface.inputs]
        results = [torch.from_numpy(outputs[spec.name]) for spec in self.interface.outputs]

        def step() -> None:
            with torch.inference_mode():
                for result, value in zip(results, self._module(*arguments)):
                    result.copy_(value)

        return step


def load_stages(policy) -> dict[str, TorchStage]:
    """Name -> stage of a loaded policy."""
    return {stage.name: TorchStage(stage) for stage in policy.stages()}
