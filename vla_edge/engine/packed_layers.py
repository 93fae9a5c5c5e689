"""Compressed layers -> tensors as other libraries store them, value by value; `policy.packed` is the way back.

| layout | read by | what it holds |
|---|---|---|
| `modelopt` | TensorRT-LLM, TensorRT Edge-LLM | int4 in groups ("W4A16_AWQ"), scales of inputs too |
| `edge_llm` | TensorRT Edge-LLM | the same within the limits of its products: groups of 128, widths of multiples of 64 |
| `compressed_tensors` | vLLM, SGLang, transformers | int4 and int8, in groups or whole channels ("pack-quantized") |
| `awq` | vLLM, SGLang, TGI, transformers, mlx-lm, ONNX Runtime GenAI | int4 in groups of one size (AutoAWQ's "gemm") |

Layers in floating point are float16 in all of them, which is what these runtimes multiply in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vla_edge.compress.quantize.weights import CompressedLinear, QuantizedWeight
from vla_edge.policy.packed import AWQ_ORDER
from vla_edge.types import VlaEdgeError

EDGE_LLM_GROUP, EDGE_LLM_WIDTH = 128, 64  # of its Int4GroupwiseGemmPlugin, versions 1 and 2
_HALF = np.finfo(np.float16)


class LayoutError(VlaEdgeError):
    """A layer that a layout cannot hold as it is, or a layout that is unknown."""


@dataclass(frozen=True)
class Grid:
    """What a layer's weights are rounded to, known from the recipe already.

    Attributes:
        shape: (out, in). format: of the values. group: inputs that share a scale, None for all of a row.
    """

    shape: tuple[int, int]
    format: str
    group: int | None

    @classmethod
    def of(cls, layer: CompressedLinear) -> Grid:
        return cls(layer.shape, layer.weight.format, layer.weight.group_size)


@dataclass(frozen=True)
class Layout:
    """One way of storing rounded layers.

    Attributes:
        fits: a grid -> None, or why it cannot be stored.
        pack: a rounded layer -> its tensors by the name that follows the layer's.
        describe: grids by layer, layers in floating point, whether inputs are scaled -> file -> what it says of them;
            what "config.json" says becomes its `quantization_config`.
        scales_inputs: whether scales of inputs can be stored.
        one_group: whether all layers have to have groups of one size.
        recipe: what a layer has to be quantized with.
    """

    fits: Callable[[Grid], str | None]
    pack: Callable[[QuantizedWeight], dict[str, np.ndarray]]
    describe: Callable[[Mapping[str, Grid], list[str], bool], dict[str, dict]]
    scales_inputs: bool
    one_group: bool
    recipe: str

    def check(self, grids: Mapping[str, Grid]) -> None:
        """Raises LayoutError: why layers rounded like that cannot be stored, and what can."""
        first = next(iter(grids), None)
        for name, grid in grids.items():
            reason = self.fits(grid)
            if self.one_group and grid.group != grids[first].group:
                reason = f"has groups of {grid.group}, {first} of {grids[first].group}, and all have to be of one size"
            if reason:
                raise LayoutError(f"{name} {reason}; quantize it with {self.recipe}, or keep it in float16")


def get_layout(name: str) -> Layout:
    """Raises LayoutError: there is none of that name."""
    if name not in LAYOUTS:
        raise LayoutError(f"there is no layout {name!r}; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def pack_layer(name: str, layer: CompressedLinear, layout: Layout, scaled: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a layer, by the name that follows the layer's.

    Args:
        scaled: store a scale for every input even where all are 1.

    Raises:
        LayoutError: something of it cannot be stored.
    """
    for what, part in (("rounds its inputs", layer.activation), ("has a low-rank branch", layer.low_rank)):
        if part is not None:
            raise LayoutError(f"{name} {what}, which is not stored with weights; quantize it with {layout.recipe}")
    found = {} if layer.bias is None else {"bias": in_half(f"{name}'s bias", layer.bias)}
    if not layer.quantized:
        return {"weight": in_half(name, layer.effective_weight()), **found}
    layout.check({name: Grid.of(layer)})
    steps = layer.weight.steps
    if not (np.isfinite(steps).all() and np.abs(steps).max() <= _HALF.max and np.abs(steps).min() >= _HALF.tiny):
        raise LayoutError(f"{name} has scales that float16 cannot hold; keep it in float16")
    found |= layout.pack(layer.weight)
    if layer.input_scale is not None and not layout.scales_inputs:
        raise LayoutError(f"{name} scales its inputs at run time, which this layout does not hold; choose `modelopt`")
    if layer.input_scale is not None or scaled:
        scale = np.ones(layer.shape[1], np.float32) if layer.input_scale is None else layer.input_scale
        found["pre_quant_scale"] = in_half(f"{name}'s input scale", scale)
    return found


def in_half(name: str, values: np.ndarray) -> np.ndarray:
    """`values` in float16.

    Raises:
        LayoutError: one is beyond its range.
    """
    with np.errstate(over="ignore"):  # said below
        half = np.asarray(values, np.float32).astype(np.float16)
    if not np.isfinite(half).all():
        raise LayoutError(f"{name} has values that float16 cannot hold")
    return half


def _modelopt_fits(grid: Grid) -> str | None:
    if grid.format != "int4" or grid.group is None:
        return f"has {grid.format} weights" + (" with a scale for each row" if grid.group is None else "")
    return f"has {grid.shape[0]} outputs, an odd number" if grid.shape[0] % 2 else None


def _edge_llm_fits(grid: Grid) -> str | None:
    if told := _modelopt_fits(grid):
        return told
    if grid.group != EDGE_LLM_GROUP:
        return f"has groups of {grid.group}, and Edge-LLM multiplies groups of {EDGE_LLM_GROUP} only"
    if any(width % EDGE_LLM_WIDTH for width in grid.shape):
        return f"is {grid.shape[0]} x {grid.shape[1]}, and Edge-LLM multiplies multiples of {EDGE_LLM_WIDTH} only"
    return None


def _compressed_fits(grid: Grid) -> str | None:
    return None if grid.format in ("int4", "int8") else f"has {grid.format} weights"


def _modelopt(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    """Bytes of two outputs, the even one in the low half, as two's complements."""
    codes = weight.values.view(np.uint8) & 15
    return {"weight": codes[0::2] | codes[1::2] << 4, "weight_scale": weight.steps}


def _compressed(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    """Words of 32 bits along the inputs, the lowest bits first, integers raised by half their range."""
    rows, columns = weight.values.shape
    bits = weight.grid.bits
    lifted = weight.values.astype(np.int64) + (1 << (bits - 1))
    filled = np.pad(lifted, ((0, 0), (0, -columns % (32 // bits)))).reshape(rows, -1, 32 // bits)
    words = (filled << np.arange(0, 32, bits)).sum(-1).astype(np.uint32).view(np.int32)
    return {
        "weight_packed": words, "weight_scale": weight.steps.reshape(rows, -1).astype(np.float16),
        "weight_shape": np.array([rows, columns], np.int64),
    }  # fmt: skip


def _awq_fits(grid: Grid) -> str | None:
    if grid.format != "int4" or grid.group is None:
        return _modelopt_fits(grid)
    return f"has {grid.shape[0]} outputs, no multiple of 8" if grid.shape[0] % 8 else None


def _awq(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    """Words of 32 bits along the outputs, integers raised by 8, eight outputs in the order of AWQ's kernels."""
    rows = weight.values.shape[0]

    def words(lifted: np.ndarray) -> np.ndarray:  # (n, out) -> (n, out / 8)
        eights = lifted.reshape(len(lifted), rows // 8, 8)[..., np.argsort(AWQ_ORDER)].astype(np.int64)
        return (eights << np.arange(0, 32, 4)).sum(-1).astype(np.uint32).view(np.int32)

    scales = weight.steps.T.astype(np.float16)
    return {
        "qweight": words(weight.values.T.astype(np.int64) + 8), "qzeros": words(np.full(scales.shape, 8)), "scales": scales,
    }  # fmt: skip


def _describe_awq(grids: Mapping[str, Grid], floats: list[str], scaled: bool) -> dict[str, dict]:
    return {
        "config.json": {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": next(iter(grids.values())).group,
            "zero_point": True, "modules_to_not_convert": floats,
        }
    }  # fmt: skip


def _describe_modelopt(grids: Mapping[str, Grid], floats: list[str], scaled: bool) -> dict[str, dict]:
    from vla_edge import __version__

    def algorithm(group: int) -> dict:
        return {"quant_algo": "W4A16_AWQ", "group_size": group, "has_zero_point": False, "pre_quant_scale": scaled}

    groups = {name: grid.group for name, grid in grids.items()}
    said: dict = {"kv_cache_quant_algo": None, "exclude_modules": floats}
    if len(set(groups.values())) == 1:
        said = {**algorithm(next(iter(groups.values()))), **said}
    else:
        layers = {name: algorithm(group) for name, group in groups.items()}
        said = {"quant_algo": "MIXED_PRECISION", **said, "quantized_layers": layers}
    producer = {"name": "vla_edge", "version": __version__}
    inside = {"quant_method": "modelopt", **{key: value for key, value in said.items() if key != "exclude_modules"}}
    return {
        "hf_quant_config.json": {"producer": producer, "quantization": said},
        "config.json": {**inside, "ignore": floats, "producer": producer},
    }


def _describe_compressed(grids: Mapping[str, Grid], floats: list[str], scaled: bool) -> dict[str, dict]:
    alike: dict[tuple, list[str]] = {}
    for name, grid in grids.items():
        alike.setdefault((grid.format, grid.group), []).append(name)
    groups = {}
    for number, ((format, group), names) in enumerate(alike.items()):
        weights = {"num_bits": int(format.removeprefix("int")), "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "channel" if group is None else "group", "group_size": group}
        targets = ["Linear"] if len(alike) == 1 else names
        groups[f"group_{number}"] = {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
            "format": "pack-quantized",
        }  # fmt: skip
    return {
        "config.json": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": floats, "kv_cache_scheme": None,
        }
    }  # fmt: skip


LAYOUTS = {
    "edge_llm": Layout(
        _edge_llm_fits, _modelopt, _describe_modelopt, True, True,
        "`weights: int4, group_size: 128` and nothing that rounds inputs",
    ),
    "modelopt": Layout(
        _modelopt_fits, _modelopt, _describe_modelopt, True, False,
        "`weights: int4` in groups and nothing that rounds inputs",
    ),
    "compressed_tensors": Layout(
        _compressed_fits, _compressed, _describe_compressed, False, False,
        "`weights: int4` or `weights: int8` and nothing that rounds inputs",
    ),
    "awq": Layout(
        _awq_fits, _awq, _describe_awq, False, True,
        "`weights: int4` in groups of a size that divides all layers' inputs, and nothing that rounds or scales inputs",
    ),
}  # fmt: skip
