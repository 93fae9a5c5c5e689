"""Stages of a compressed policy -> files -> what runs fastest here, with what the manifest tells of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.compress.quantize.weights import CompressedLinear, weight_fractions
from vla_edge.engine.backends import FORMATS, BackendError, LoadedStage, StageInterface, get_backend, reads
from vla_edge.engine.bundle import StageEntry
from vla_edge.engine.choose import Choice, choose

# what verifies an engine whose device is not here
STAND_IN = "onnxruntime"


@dataclass(frozen=True)
class ExportedStage:
    """A stage as a file.

    Attributes:
        file: its ONNX, or GGUF. layers: what its linear layers got.
        traced: the graph it was made of, whose markers name its layers; None where it was made of none.
    """

    interface: StageInterface
    file: Path
    layers: Mapping[str, CompressedLinear]
    traced: object


def export_stages(
    stages,
    layers: Mapping[str, Mapping[str, CompressedLinear]],
    directory: Path,
    traced: MutableMapping,
    key: str,
    tell,
    ready: Callable = nullcontext,
) -> list[ExportedStage]:
    """Every stage as a file in `directory`: ONNX, or GGUF of one that writes all tokens of a policy.

    Args:
        layers: stage -> layer -> what it got. traced: graphs of earlier builds by `key` and stage, filled here.
        tell: called with the number of stages done and the stage being exported.
        ready: stage -> a context in which all of it but its linear layers is in memory.

    Raises:
        ExportError: a stage cannot be exported.
    """
    from vla_edge.engine.export import ConstantStore, export_stage, trace
    from vla_edge.engine.gguf_file import export_language

    exported, store = [], ConstantStore(directory)
    for index, stage in enumerate(stages):
        tell(index, stage.name)
        name, graph = f"{key} {stage.name}", None
        mine = layers.get(stage.shares or stage.name, {})
        with ready(stage):
            if stage.name == "generate":
                file = export_language(stage, mine, directory / f"{stage.name}.gguf")
            else:
                graph = traced[name] = traced.get(name) or trace(stage)
                file = export_stage(stage, mine, directory / f"{stage.name}.onnx", graph, store)
        interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        exported.append(ExportedStage(interface, file, mine, graph))
    return exported


def compile_stages(
    exported: Sequence[ExportedStage],
    directory: Path,
    backends: Sequence[str],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    only_exact: bool,
    tell,
    in_turn: bool = False,
) -> list[StageEntry]:
    """The fastest way of running each stage, compiled into `directory`.

    Args:
        backends: to choose from. inputs: stage -> what it is run on meanwhile.
        only_exact: leave out ways that round more than the files ask for.
        tell: called with the number of stages done and the stage being compiled.
        in_turn: have one way of running one stage in memory at a time.

    Raises:
        BackendError: nothing can run a stage.
    """
    entries = []
    for index, stage in enumerate(exported):
        name = stage.interface.name
        tell(index, name)
        able = [backend for backend in backends if reads(get_backend(backend)) == stage.file.suffix]
        if not able:
            raise BackendError(
                f"none of {', '.join(backends)} reads the file of stage {name!r}, which is {FORMATS[stage.file.suffix]}; "
                "name a backend that does too, as in --backend onnxruntime,llama_cpp"
            )
        given = inputs.get(name)
        chosen = choose(stage.file, directory, stage.interface, able, given, only_exact, in_turn)
        entries.append(_entry(stage, chosen))
    return entries


def compile_ahead(
    exported: Sequence[ExportedStage], directory: Path, backend: str, options: Mapping, scratch: Path, tell
) -> tuple[list[StageEntry], dict[str, LoadedStage]]:
    """Every stage compiled for a device that is not here, and the same computation on this computer's processor.

    Args:
        options: what the backend is told of the device. scratch: where files for this computer go.

    Raises:
        BackendError: why a stage cannot be built for that device, or what stands in for it cannot run here.
    """
    runtime, here = get_backend(backend), get_backend(STAND_IN)
    entries, loaded = [], {}
    for index, stage in enumerate(exported):
        name = stage.interface.name
        tell(index, name)
        entries.append(_entry(stage, Choice(backend, runtime.build(stage.file, directory, stage.interface, options))))
        runtime.portable(stage.file, scratch / f"{name}.portable.onnx")
        place = scratch / "here"
        place.mkdir(exist_ok=True)
        built = here.build(scratch / f"{name}.portable.onnx", place, stage.interface)
        loaded[name] = here.load(place / built.file, stage.interface, built.options)
    return entries, loaded


def _entry(stage: ExportedStage, choice: Choice) -> StageEntry:
    return StageEntry(
        stage.interface,
        choice.built.file,
        choice.backend,
        choice.built.options,
        weight_fractions(stage.layers),
        {layer: compressed.describe() for layer, compressed in stage.layers.items()},
        choice.tried,
        choice.refused,
    )
