"""Which runtimes are here, and what each of them really multiplied on this computer, held to numpy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vla_edge.engine import gguf_file, language_probe
from vla_edge.engine.backends import BACKENDS, BackendError, StageInterface, get_backend, reads, runs_here
from vla_edge.engine.product import PRECISIONS, in_precision, product_file, product_interface
from vla_edge.types import VlaEdgeError

ROWS, INPUTS, OUTPUTS, GROUP = 8, 64, 48, 32
# of the norm; inputs in 8 bits err by 1 %, bfloat16 by 0.5 %, a wrong kernel by 100 %
MOST_RELATIVE_L2 = 0.03


@dataclass(frozen=True)
class _Probe:
    """A stage, what it is given and what it has to give (its only output), and what writes its file to a path."""

    interface: StageInterface
    inputs: Mapping[str, np.ndarray]
    expected: np.ndarray
    write: Callable[[Path], object]


@dataclass(frozen=True)
class Overview:
    """One runtime.

    Attributes:
        version: None where it is not installed. precisions: what it multiplies in, by its makers' word.
        ran: what gave the right product here. built: what it compiled for a device that is not here.
        refused: precision -> why not.
        missing: what to do, where it is not installed.
    """

    name: str
    version: str | None
    precisions: tuple[str, ...] = ()
    ran: tuple[str, ...] = ()
    built: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


def overview() -> list[Overview]:
    """Every runtime of `BACKENDS`, tried. Needs the packages that build engines, but no PyTorch.

    Raises:
        VlaEdgeError: those are missing.
    """
    try:
        probes = {".onnx": _products(), ".gguf": _languages()}
    except ImportError as error:
        raise VlaEdgeError(
            f"trying the runtimes needs {error.name}; install it with pip install {error.name}"
        ) from error
    return [_try(name, probes) for name in BACKENDS]


def table(rows: list[Overview]) -> str:
    """For people."""
    wide = max(len(", ".join(row.ran)) for row in rows) + 2
    lines = [f"{'backend':14}{'version':14}{'ran right here, files in':{wide}}built for a device that is not here"]
    for row in rows:
        if row.version is None:
            lines.append(f"{row.name:14}{'-':14}{row.missing}")
        else:
            lines.append(
                f"{row.name:14}{row.version:14}{', '.join(row.ran) or '-':{wide}}{', '.join(row.built)}".rstrip()
            )
    for row in rows:
        lines += [f"  {row.name} has no {precision}: {why[:120]}" for precision, why in row.refused.items()]
    return "\n".join(lines)


def _try(name: str, probes: Mapping[str, Mapping[str, _Probe]]) -> Overview:
    try:
        runtime = get_backend(name)
    except BackendError as error:
        return Overview(name, None, missing=str(error))
    here = runs_here(name)
    ran, built, refused = [], [], {}
    with tempfile.TemporaryDirectory() as directory:
        for precision, probe in probes[reads(runtime)].items():
            file = Path(directory) / f"given{reads(runtime)}"
            probe.write(file)
            for options in _ways(runtime, file, precision):
                label = "bfloat16" if options.get("precision") == "bf16" else precision
                try:
                    stage = runtime.build(file, directory, probe.interface, options)
                    if here:
                        loaded = runtime.load(Path(directory) / stage.file, probe.interface, stage.options)
                        _hold(next(iter(loaded.run(probe.inputs).values())), probe.expected)
                    (ran if here else built).append(label)
                except BackendError as error:
                    refused[label] = str(error)
    return Overview(name, runtime.version(), runtime.precisions(), tuple(ran), tuple(built), refused)


def _ways(runtime, file: Path, precision: str) -> list[dict]:
    """The exact one on the fewest threads; for a file in float32 also the one that rounds to bfloat16."""
    ways = runtime.candidates(file)
    fewest = min(options.get("threads", 1) for options in ways)
    found = [options for options in ways if options.get("threads", 1) == fewest]
    rounding = [options for options in found if options.get("precision") == "bf16" and not options.get("compile")]
    return [found[0], *(rounding[:1] if precision == "float32" else [])]


def _hold(found: np.ndarray, expected: np.ndarray) -> None:
    distance = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not distance <= MOST_RELATIVE_L2:
        raise BackendError(f"it computes something else: relative L2 {distance:.3g}")


def _products() -> dict[str, _Probe]:
    """Precision -> a file with one product."""
    weight = np.random.default_rng(0).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    inputs = np.random.default_rng(1).uniform(-1, 1, (1, ROWS, INPUTS)).astype(np.float32)
    found, interface = {}, product_interface(ROWS, INPUTS, OUTPUTS)
    for name in PRECISIONS:
        layer = in_precision(weight, name, GROUP)
        dense = layer.weight.dequantize() if layer.quantized else layer.weight.astype(np.float32)
        write = partial(Path.write_bytes, data=product_file(layer, ROWS))
        found[name] = _Probe(interface, {"x": inputs}, inputs @ dense.T, write)
    return found


def _languages() -> dict[str, _Probe]:
    """Precision -> a file with a language model of one layer."""
    found = {}
    for name in language_probe.PRECISIONS:
        model = language_probe.language(name)
        found[name] = _Probe(
            language_probe.interface(), language_probe.inputs(), language_probe.expected(model),
            partial(gguf_file.write_language, model),
        )  # fmt: skip
    return found
