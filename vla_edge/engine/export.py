"""Stage + compressed layers -> one ONNX file, standard operators only, the same bytes every time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.engine.lower import lower
from vla_edge.engine.trace import ExportError, linear_layers, trace
from vla_edge.policy.stages import Stage
from vla_edge.policy.weights import OnDemand

__all__ = ["ConstantStore", "ExportError", "as_it_is", "export_stage", "leave_to", "linear_layers", "trace"]

LARGEST_FILE = 2**30  # bytes of constants; a protocol buffer holds less than twice that
PAGE = 4096  # what a runtime can map into memory begins at a multiple of it


class ConstantStore:
    """Files of raw constants beside the stages that read them. One that several stages hold is written once: the layers
    that a decoding stage shares with the one that reads the prompt are on the disk, and in its cache, a single time.

    Args:
        directory: of the stages.
    """

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        self._places: dict[bytes, tuple[str, int]] = {}

    @contextmanager
    def taking(self, file: str) -> Iterator[Callable[[object], None]]:
        """A context with what takes a stage's constants one by one: into `file`, or to where they are already, all but small
        ones, as soon as they are too large together for one file of ONNX."""
        waiting, size = [], 0

        def take(constant) -> None:
            nonlocal size
            size += len(constant.raw_data)
            waiting.append(constant)
            if size > LARGEST_FILE:
                for one in waiting:
                    self._move_out(one, file, out)
                waiting.clear()

        path = self._directory / file
        with open(path, "wb") as out:
            yield take
        if not path.stat().st_size:
            path.unlink()

    def _move_out(self, constant, file: str, out: BinaryIO) -> None:
        raw = constant.raw_data
        if len(raw) < PAGE:
            return
        key = hashlib.sha256(raw).digest()
        if key not in self._places:
            out.seek(-(-out.tell() // PAGE) * PAGE)
            self._places[key] = file, out.tell()
            out.write(raw)
        location, offset = self._places[key]
        leave_to(constant, location, offset)


def leave_to(constant, file: str, offset: int) -> None:
    """Have a constant's data (`onnx.TensorProto`) read from where it lies in a file beside the stage's."""
    from onnx.external_data_helper import set_external_data

    set_external_data(constant, file, offset, len(constant.raw_data))
    constant.ClearField("raw_data")
    constant.data_location = constant.EXTERNAL


def export_stage(
    stage: Stage,
    layers: Mapping[str, CompressedLinear],
    path: str | Path,
    traced=None,
    store: ConstantStore | None = None,
) -> Path:
    """Write `stage` with its `layers` to `path`.

    Args:
        layers: linear layers by their name within the stage; those not named stay in float32.
        traced: result of `trace` for this stage, or for one that differs in values only, to write several recipes from one
            trace.
        store: where constants go that are too large together for one file of ONNX; no stage may be so large when None.

    Raises:
        ExportError: torch cannot export the stage, or a layer would be lost.
    """
    import onnx

    unknown = set(layers) - set(linear_layers(stage))
    if unknown:
        raise ExportError(f"stage {stage.name!r} has no linear layer {sorted(unknown)[0]!r}, for which there is a plan")
    modules = linear_layers(stage)
    everything = OnDemand(modules, lambda name: layers[name] if name in layers else as_it_is(modules[name]))
    parameters = {
        name: value.detach().cpu().numpy()
        for name, value in stage.module.named_parameters() if name.rpartition(".")[0] not in modules
    }  # fmt: skip
    path = Path(path)
    with nullcontext(lambda constant: None) if store is None else store.taking(f"{stage.name}.weights") as take:
        model = lower(trace(stage) if traced is None else traced, everything, parameters, stage.name, take)
    path.write_bytes(model.SerializeToString(deterministic=True))
    del model  # the checker reads the file
    onnx.checker.check_model(str(path), full_check=True)  # by its name, so that it is checked with what lies beside it
    return path


def as_it_is(module, dtype: str = "float32") -> CompressedLinear:
    """An `nn.Linear` kept in floating point."""
    weight = module.weight.detach().cpu().float().numpy().astype(dtype)
    return CompressedLinear(weight, None if module.bias is None else module.bias.detach().cpu().float().numpy())
