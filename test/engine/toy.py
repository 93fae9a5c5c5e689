"""Inputs for the toy stage, and its layers in every precision."""

from __future__ import annotations

import numpy as np

from vla_edge.compress.quantize.ranges import RangeObserver, calibrate
from vla_edge.compress.quantize.rtn import round_to_nearest
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear
from vla_edge.engine.export import as_it_is, linear_layers
from vla_edge.policy.stages import Stage

PRECISIONS = ("float32", "float16", "int8", "int4", "int8 static", "int8 dynamic")


def toy_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {"x": rng.normal(size=(1, 9, 40)).astype(np.float32), "shift": rng.normal(size=(1, 24)).astype(np.float32)}


def compressed(stage: Stage, precision: str) -> dict[str, CompressedLinear]:
    layers = {}
    for name, module in linear_layers(stage).items():
        kept = as_it_is(module, precision if precision.startswith("float") else "float32")
        activation = None
        if precision == "int8 static":
            observer = RangeObserver()
            observer.update(np.array([-4.0, 4.0]))
            activation = calibrate(observer)
        elif precision == "int8 dynamic":
            activation = ActivationQuant("dynamic")
        if precision.startswith("int"):
            bits, group = (4, 32) if precision == "int4" else (8, None)
            kept = CompressedLinear(round_to_nearest(kept.weight, bits, group), kept.bias, activation)
        layers[name] = kept
    return layers
