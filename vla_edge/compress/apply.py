"""Plan + calibrated ranges -> the compressed layers, ready for export."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vla_edge.compress.calibrate import CalibrationError
from vla_edge.compress.quantize.ranges import RangeObserver, calibrate
from vla_edge.compress.quantize.rtn import round_to_nearest
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear
from vla_edge.compress.recipe import WEIGHTS, Keep, Quantize


def compress_layer(
    name: str, module, step: Keep | Quantize, observer: RangeObserver | None, reduce_range: bool = False
) -> CompressedLinear:
    """One `nn.Linear` as its step wants it.

    Args:
        name: "stage.path", for errors.
        observer: what calibration saw at the layer's input; needed for static activations.
        reduce_range: what `reduce_range: auto` means on the machine the engine is for.

    Raises:
        CalibrationError: static activations without data.
    """
    weight = module.weight.detach().cpu().float().numpy()
    bias = None if module.bias is None else module.bias.detach().cpu().float().numpy()
    if isinstance(step, Keep):
        return CompressedLinear(weight.astype(step.dtype), bias)
    reduced = reduce_range if step.reduce_range == "auto" else step.reduce_range
    quantized = round_to_nearest(weight, WEIGHTS[step.weights], step.group_size, reduced)
    return CompressedLinear(quantized, bias, _activation(name, step, observer))


def compress_layers(
    modules: Mapping[str, object],
    plan: Mapping[str, Keep | Quantize],
    observers: Mapping[str, RangeObserver],
    reduce_range: bool = False,
) -> dict[str, CompressedLinear]:
    """`compress_layer` for every layer of `modules`, "stage.path" -> `nn.Linear`."""
    return {
        name: compress_layer(name, modules[name], plan[name], observers.get(name), reduce_range) for name in modules
    }


def _activation(name: str, step: Quantize, observer: RangeObserver | None) -> ActivationQuant | None:
    if step.activations is None:
        return None
    if step.activations == "int8-dynamic":
        return ActivationQuant("dynamic")
    if observer is None or not np.isfinite(observer.low):
        raise CalibrationError(f"calibration never reached layer {name}; give observations that make the policy use it")
    return calibrate(observer, step.calibrator, step.percentile)
