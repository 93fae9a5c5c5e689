"""Inputs for the toy stage, and its layers in every precision."""

from __future__ import annotations

import numpy as np

from vla_edge.compress.low_rank import factorize
from vla_edge.compress.quantize.formats import number_format
from vla_edge.compress.quantize.ranges import RangeObserver, calibrate
from vla_edge.compress.quantize.rtn import round_to_nearest
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, QuantizedWeight
from vla_edge.engine.backends import StageInterface
from vla_edge.engine.export import as_it_is, linear_layers
from vla_edge.policy.stages import Stage, TensorSpec

# format of the weights, and after a space what happens to the inputs, or that other libraries rounded
PRECISIONS = (
    "float32", "float16", "lowrank", "int8", "int4", "fp8", "nvfp4", "int8 static", "int8 dynamic", "fp8 static",
    "int4 dynamic", "int4 dynamic lowrank", "int4 scaled", "int8 static scaled", "int8 dynamic scaled",
    "int4 foreign", "int8 static foreign", "int8 dynamic foreign",
)  # fmt: skip
GROUPS = {"int4": 8, "nvfp4": 16}
TOKENS = np.array([[3, 999, 0, 3, 17]])  # for `words_stage`


def interface(stage: Stage) -> StageInterface:
    return StageInterface(stage.name, stage.inputs, stage.outputs)


def even_stage() -> Stage:
    """Two layers of even widths: some runtimes take 4-bit constants of an even number of values only."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.ModuleDict({"up": nn.Linear(64, 48), "down": nn.Linear(48, 16, bias=False)})

    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = module

        def forward(self, x):
            return (self.layers["down"](self.layers["up"](x).tanh()),)

    return Stage("even", Even().eval(), (TensorSpec("x", (1, 8, 64)),), (TensorSpec("y", (1, 8, 16)),))


def words_stage() -> Stage:
    """A table of words in bfloat16, as checkpoints store it, and a norm."""
    import torch
    from torch import nn

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(1000, 32), nn.LayerNorm(32)
            self.table.weight.data = self.table.weight.data.bfloat16().float()

        def forward(self, tokens):
            return (self.norm(self.table(tokens)),)

    torch.manual_seed(0)
    return Stage("words", Words().eval(), (TensorSpec("tokens", (1, 5), "int64"),), (TensorSpec("y", (1, 5, 32)),))


def toy_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {"x": rng.normal(size=(1, 9, 40)).astype(np.float32), "shift": rng.normal(size=(1, 24)).astype(np.float32)}


def compressed(stage: Stage, precision: str) -> dict[str, CompressedLinear]:
    name, *inputs = precision.split()
    layers = {}
    for path, module in linear_layers(stage).items():
        kept = as_it_is(module, name if name.startswith("float") else "float32")
        layers[path] = kept
        if name == "lowrank":
            layers[path] = CompressedLinear(None, kept.bias, low_rank=factorize(kept.weight, 5, dtype="float16"))
        elif not name.startswith("float"):
            branch = factorize(kept.weight, 3) if "lowrank" in inputs else None
            dense = kept.weight if branch is None else kept.weight - branch.dequantize()
            scale = None
            if "scaled" in inputs:  # the same for all layers of one width, as for those that read one tensor
                scale = np.linspace(0.5, 2, kept.shape[1], dtype=np.float32)
                dense = dense * scale
            weight = round_to_nearest(dense, number_format(name), GROUPS.get(name))
            if "foreign" in inputs:
                weight = _foreign(weight)
            activation = _activation(name, inputs, weight.group_size)
            layers[path] = CompressedLinear(weight, kept.bias, activation, branch, None if scale is None else 1 / scale)
    return layers


def _foreign(weight: QuantizedWeight) -> QuantizedWeight:
    """With the most negative integer, and groups whose sign is turned."""
    values, scales = weight.values.copy(), weight.scales.copy()
    values[::3, ::7] = -weight.grid.largest - 1
    scales[::2] *= -1
    return QuantizedWeight(values, scales, weight.format, weight.group_size)


def _activation(name: str, inputs: list[str], group: int | None) -> ActivationQuant | None:
    if "static" in inputs:
        observer = RangeObserver()
        observer.update(np.array([-4.0, 4.0]))
        return calibrate(observer, form=name)
    if "dynamic" in inputs:
        return ActivationQuant("dynamic", format=name, group_size=group if name == "int4" else None)
    return None
