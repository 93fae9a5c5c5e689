"""Which runtimes are here, and what each of them really multiplied on this computer, held to numpy."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vla_edge.engine.backends import BACKENDS, BackendError, StageInterface, get_backend, runs_here
from vla_edge.engine.product import PRECISIONS, in_precision, product_file, product_interface
from vla_edge.types import VlaEdgeError

ROWS, INPUTS, OUTPUTS, GROUP = 8, 64, 48, 32
# of the norm; inputs in 8 bits err by 1 %, bfloat16 by 0.5 %, a wrong kernel by 100 %
MOST_RELATIVE_L2 = 0.03


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
        files = _probes()
    except ImportError as error:
        raise VlaEdgeError(
            f"trying the runtimes needs {error.name}; install it with pip install {error.name}"
        ) from error
    return [_try(name, files) for name in BACKENDS]


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


def _try(name: str, files: Mapping[str, tuple]) -> Overview:
    try:
        runtime = get_backend(name)
    except BackendError as error:
        return Overview(name, None, missing=str(error))
    here = runs_here(name)
    ran, built, refused = [], [], {}
    with tempfile.TemporaryDirectory() as directory:
        for precision, (model, expected) in files.items():
            file = Path(directory) / "given.onnx"
            file.write_bytes(model)
            for options in _ways(runtime, file, precision):
                label = "bfloat16" if options.get("precision") == "bf16" else precision
                try:
                    stage = runtime.build(file, directory, _interface(), options)
                    if here:
                        loaded = runtime.load(Path(directory) / stage.file, _interface(), stage.options)
                        _hold(loaded.run({"x": _inputs()})["y"], expected)
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


def _probes() -> dict[str, tuple[bytes, np.ndarray]]:
    """Precision -> (a file with one product, what numpy makes of it)."""
    weight = np.random.default_rng(0).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    found = {}
    for name in PRECISIONS:
        layer = in_precision(weight, name, GROUP)
        dense = layer.weight.dequantize() if layer.quantized else layer.weight.astype(np.float32)
        found[name] = (product_file(layer, ROWS), _inputs() @ dense.T)
    return found


def _interface() -> StageInterface:
    return product_interface(ROWS, INPUTS, OUTPUTS)


def _inputs() -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (1, ROWS, INPUTS)).astype(np.float32)
