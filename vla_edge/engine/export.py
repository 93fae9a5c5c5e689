"""Stage + compressed layers -> one ONNX file, standard operators only, the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.engine.lower import lower
from vla_edge.engine.trace import ExportError, linear_layers, rescalable_norms, trace
from vla_edge.policy.stages import Stage

__all__ = ["ExportError", "as_it_is", "export_stage", "linear_layers", "trace"]


def export_stage(
    stage: Stage,
    layers: Mapping[str, CompressedLinear],
    path: str | Path,
    traced=None,
) -> Path:
    """Write `stage` with its `layers` to `path`.

    Args:
        layers: linear layers by their name within the stage; those not named stay in float32.
        traced: result of `trace` for this stage, or for one that differs in layers and norms only, to write several
            recipes from one trace.

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
    onnx.checker.check_model(model, full_check=True)
    path = Path(path)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def as_it_is(module, dtype: str = "float32") -> CompressedLinear:
    """An `nn.Linear` kept in floating point."""
    weight = module.weight.detach().cpu().float().numpy().astype(dtype)
    return CompressedLinear(weight, None if module.bias is None else module.bias.detach().cpu().float().numpy())
