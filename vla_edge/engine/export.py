"""Stage + compressed layers -> one ONNX file, standard operators only, the same bytes every time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.engine.lower import lower
from vla_edge.engine.trace import ExportError, linear_layers, rescalable_norms, trace
from vla_edge.policy.stages import Stage

__all__ = ["ConstantStore", "ExportError", "as_it_is", "export_stage", "linear_layers", "trace"]

LARGEST_FILE = 2**30  # bytes of constants; a protocol buffer holds less than twice that
_PAGE = 4096  # what a runtime can map into memory begins at a multiple of it


class ConstantStore:
    """Files of raw constants beside the stages that read them. One that several stages hold is written once: the layers
    that a decoding stage shares with the one that reads the prompt are on the disk, and in its cache, a single time.

    Args:
        directory: of the stages.
    """

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        self._places: dict[bytes, tuple[str, int]] = {}

    def move_out(self, model, file: str) -> None:
        """The constants of `model` into `file`, or to where they are already; all but small ones, in place."""
        from onnx import TensorProto
        from onnx.external_data_helper import set_external_data

        path = self._directory / file
        with open(path, "wb") as out:
            for constant in model.graph.initializer:
                raw = constant.raw_data
                if len(raw) < _PAGE:
                    continue
                key = hashlib.sha256(raw).digest()
                if key not in self._places:
                    out.seek(-(-out.tell() // _PAGE) * _PAGE)
                    self._places[key] = file, out.tell()
                    out.write(raw)
                location, offset = self._places[key]
                set_external_data(constant, location, offset, len(raw))
                constant.ClearField("raw_data")
                constant.data_location = TensorProto.EXTERNAL
        if not path.stat().st_size:
            path.unlink()


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
        traced: result of `trace` for this stage, or for one that differs in layers and norms only, to write several
            recipes from one trace.
        store: where constants go that are too large together for one file of ONNX; no stage may be so large when None.

    Raises:
        ExportError: torch cannot export the stage, or a layer would be lost.
    """
    import onnx

    unknown = set(layers) - set(linear_layers(stage))
    if unknown:
        raise ExportError(f"stage {stage.name!r} has no linear layer {sorted(unknown)[0]!r}, for which there is a plan")
    everything = {name: layers.get(name) or as_it_is(module) for name, module in linear_layers(stage).items()}
    norms = {
        f"{name}.{key}": value.detach().cpu().float().numpy()
        for name, norm in rescalable_norms(stage.module).items()
        for key, value in norm.named_parameters(recurse=False)
    }
    model = lower(trace(stage) if traced is None else traced, everything, norms, stage.name)
    path = Path(path)
    if store is not None and sum(len(constant.raw_data) for constant in model.graph.initializer) > LARGEST_FILE:
        store.move_out(model, f"{stage.name}.weights")
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)  # by its name, so that it is checked with what lies beside it
    return path


def as_it_is(module, dtype: str = "float32") -> CompressedLinear:
    """An `nn.Linear` kept in floating point."""
    weight = module.weight.detach().cpu().float().numpy().astype(dtype)
    return CompressedLinear(weight, None if module.bias is None else module.bias.detach().cpu().float().numpy())
