"""Runtimes behind the stage contract, one file each; each is imported only when it is asked for.

A backend module offers

    version() -> str
    build(onnx, directory, stage, options) -> BuiltStage    compile one stage into `directory`
    load(path, stage, options, threads) -> LoadedStage      ready to run
    gains_by_reduced_range() -> bool                        whether 7-bit weights are faster than 8-bit ones here
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

import numpy as np

from vla_edge.policy.stages import TensorSpec
from vla_edge.types import VlaEdgeError

# name -> (module, what to install)
BACKENDS = {"onnxruntime": ("vla_edge.engine.backends.onnxruntime", "onnxruntime")}


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
        options: what `load` has to be told, plain types, chosen by measuring where there was a choice.
        tried: variant -> ms, what the choice was made from; empty where there was none.
    """

    file: str
    options: Mapping = field(default_factory=dict)
    tried: Mapping[str, float] = field(default_factory=dict)


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
        raise BackendError(f"there is no backend {name!r}; choose one of {', '.join(sorted(BACKENDS))}")
    module, package = BACKENDS[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"backend {name!r} needs the package {package}, which cannot be imported here ({error}); "
            f"install it with pip install {package}"
        ) from error
