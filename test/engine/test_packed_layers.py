"""What is stored for other libraries is read back by ours, value by value; what a layout cannot hold is named."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, LowRank, QuantizedWeight
from vla_edge.engine.packed_layers import LAYOUTS, Grid, LayoutError, get_layout, pack_layer
from vla_edge.engine.product import in_precision
from vla_edge.policy.packed import find_packed


def random_layer(rows: int, columns: int, format: str = "int4", group: int | None = 32, full: bool = True) -> CompressedLinear:
    """With every code, the most negative one too."""
    rng = np.random.default_rng(rows + columns)
    most = {"int4": 7, "int8": 127}[format]
    values = rng.integers(-most - full, most + 1, (rows, columns)).astype(np.int8)
    scales = rng.uniform(1e-3, 2e-3, (rows, columns // group) if group else rows)
    return CompressedLinear(QuantizedWeight(values, scales.astype(np.float16), format, group))


def read_back(tensors: dict[str, np.ndarray]):
    """By what loads checkpoints that were rounded elsewhere."""
    (found,) = find_packed(f"layer.{name}" for name in tensors).values()
    stored = {f"layer.{name}": torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()}
    return found.unpack(stored.__getitem__, Path("nowhere"))


@pytest.mark.parametrize(("layout", "format", "shape", "group"), [
    ("edge_llm", "int4", (64, 256), 128), ("modelopt", "int4", (6, 96), 32), ("modelopt", "int4", (10, 64), 64),
    ("compressed_tensors", "int4", (5, 96), 32), ("compressed_tensors", "int4", (5, 20), 4),
    ("compressed_tensors", "int4", (7, 24), None), ("compressed_tensors", "int8", (5, 96), 32),
    ("compressed_tensors", "int8", (7, 21), None), ("awq", "int4", (16, 96), 32), ("awq", "int4", (8, 128), 128),
])  # fmt: skip
def test_every_value_comes_back(layout, format, shape, group):
    layer = random_layer(*shape, format, group)
    found = read_back(pack_layer("layer", layer, get_layout(layout)))
    np.testing.assert_array_equal(found.weight, layer.effective_weight())
    np.testing.assert_array_equal(found.steps, layer.weight.steps.reshape(shape[0], -1))


def test_scales_of_inputs_come_back_too():
    rng = np.random.default_rng(0)
    layer = random_layer(6, 96)
    scale = rng.uniform(0.5, 2, 96).astype(np.float16).astype(np.float32)
    scaled = CompressedLinear(layer.weight, input_scale=scale)
    found = read_back(pack_layer("layer", scaled, get_layout("modelopt")))
    np.testing.assert_allclose(found.weight, scaled.effective_weight(), rtol=1e-6)
    with pytest.raises(LayoutError, match="scales its inputs at run time.*choose `modelopt`"):
        pack_layer("layer", scaled, get_layout("compressed_tensors"))
    # where some layers have them all have
    np.testing.assert_array_equal(pack_layer("layer", layer, get_layout("modelopt"), scaled=True)["pre_quant_scale"], np.ones(96))


def test_layers_in_floating_point_are_float16():
    weight = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    for kind in ("float32", "float16", ml_dtypes.bfloat16):
        layer = CompressedLinear(weight.astype(kind), np.ones(6, np.float32))
        for layout in LAYOUTS.values():
            found = pack_layer("layer", layer, layout)
            assert {tensor.dtype.name for tensor in found.values()} == {"float16"} and set(found) == {"weight", "bias"}
            np.testing.assert_allclose(found["weight"], layer.effective_weight(), rtol=2.0**-11, atol=1e-7)
    with pytest.raises(LayoutError, match="has values that float16 cannot hold"):
        pack_layer("layer", CompressedLinear(np.full((2, 2), 1e5, np.float32)), LAYOUTS["modelopt"])


THIN = LowRank(np.ones((1, 64), np.float32), np.ones((6, 1), np.float32))


@pytest.mark.parametrize(("layout", "layer", "told"), [
    ("edge_llm", random_layer(64, 128, group=64), "groups of 64, and Edge-LLM multiplies groups of 128"),
    ("edge_llm", random_layer(96, 128, group=128), "is 96 x 128, and Edge-LLM multiplies multiples of 64"),
    ("edge_llm", random_layer(64, 128, "int8", None), "has int8 weights with a scale for each row; quantize it with .*128"),
    ("modelopt", random_layer(5, 64), "has 5 outputs, an odd number"),
    ("modelopt", random_layer(6, 64, group=None), "a scale for each row"),
    ("awq", random_layer(12, 64), "has 12 outputs, no multiple of 8"), ("awq", random_layer(8, 64, "int8"), "has int8 weights"),
    ("compressed_tensors", in_precision(np.ones((4, 32), np.float32), "nvfp4 weights", 16), "has nvfp4 weights"),
    ("modelopt", CompressedLinear(random_layer(6, 64).weight, activation=ActivationQuant("dynamic")), "rounds its inputs"),
    ("modelopt", CompressedLinear(random_layer(6, 64).weight, low_rank=THIN), "has a low-rank branch"),
    ("modelopt", CompressedLinear(QuantizedWeight(np.ones((2, 32), np.int8), np.full((2, 1), 1e-9, np.float32), "int4", 32)),
     "has scales that float16 cannot hold"),
])  # fmt: skip
def test_what_a_layout_cannot_hold_is_named(layout, layer, told):
    with pytest.raises(LayoutError, match=told):
        pack_layer("model.layer", layer, get_layout(layout))


def test_an_unknown_layout_is_named():
    with pytest.raises(LayoutError, match="no layout 'gguf'; choose one of edge_llm, modelopt, compressed_tensors, awq"):
        get_layout("gguf")


def test_layers_of_several_kinds_are_described_apart():
    grids = {"a": Grid((4, 64), "int4", 32), "b": Grid((4, 64), "int4", 64), "c": Grid((4, 64), "int4", 64)}
    said = LAYOUTS["modelopt"].describe(grids, ["lm_head"], True)["hf_quant_config.json"]["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION" and said["exclude_modules"] == ["lm_head"]
    assert {name: row["group_size"] for name, row in said["quantized_layers"].items()} == {"a": 32, "b": 64, "c": 64}
    groups = LAYOUTS["compressed_tensors"].describe(grids, ["lm_head"], False)["config.json"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a"], ["b", "c"]]
    json.dumps(groups)
    with pytest.raises(LayoutError, match="b has groups of 64, a of 32, and all have to be of one size"):
        LAYOUTS["awq"].check({name: Grid((8, 64), "int4", grid.group) for name, grid in grids.items()})


@pytest.mark.peers
@pytest.mark.parametrize("group", [32, 64])
def test_bytes_are_those_that_modelopt_packs(group):
    theirs = pytest.importorskip("modelopt.torch.export.quant_utils")
    layer = random_layer(10, 128, group=group)
    weight, scales = (torch.from_numpy(array) for array in (layer.effective_weight(), layer.weight.steps))
    packed = theirs.pack_int4_in_uint8(weight, scales, group)
    np.testing.assert_array_equal(pack_layer("layer", layer, LAYOUTS["modelopt"])["weight"], packed)


@pytest.mark.peers
@pytest.mark.parametrize(("format", "columns"), [("int4", 96), ("int4", 21), ("int8", 21)])
def test_words_are_those_that_compressed_tensors_packs(format, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    layer = random_layer(5, columns, format, None)
    packed = helpers.pack_to_int32(torch.from_numpy(np.array(layer.weight.values)), layer.weight.grid.bits)
    np.testing.assert_array_equal(pack_layer("layer", layer, LAYOUTS["compressed_tensors"])["weight_packed"], packed)
