"""GGUF's blocks hold the very codes and scales, and what they cannot hold is refused with what they can."""

from __future__ import annotations

import numpy as np
import pytest

from vla_edge.compress.quantize.formats import number_format
from vla_edge.compress.quantize.rtn import round_to_nearest
from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.engine.gguf_blocks import BlockError, blocks


def weight(form: str, group: int | None, columns: int = 128) -> QuantizedWeight:
    dense = np.random.default_rng(0).normal(size=(6, columns)).astype(np.float32)
    return round_to_nearest(dense, number_format(form), group)


def unpacked(data: np.ndarray, form: str) -> np.ndarray:
    """As llama.cpp's ggml-quants.c describes them, written here from that description."""
    found = []
    for row in data:
        for block in row.reshape(-1, 18 if form == "int4" else 34):
            scale = float(block[:2].copy().view(np.float16)[0])
            codes = block[2:]
            values = [*(codes & 15), *(codes >> 4)] if form == "int4" else codes.view(np.int8)
            found.extend(scale * (float(value) - (8 if form == "int4" else 0)) for value in values)
    return np.array(found).reshape(len(data), -1)


@pytest.mark.parametrize(("form", "group"), [("int4", 32), ("int4", 64), ("int8", 32), ("int8", None)])
def test_what_they_say_is_the_weight(form, group):
    exact = weight(form, group)
    data = blocks(exact, "a layer")
    assert data.dtype == np.uint8 and data.nbytes == exact.values.size // 32 * (18 if form == "int4" else 34)
    # scales of whole channels are float32 until here
    np.testing.assert_allclose(unpacked(data, form), exact.dequantize(), rtol=0 if group else 5e-4)


def test_the_most_negative_codes_are_held_too():
    values = np.full((1, 32), -8)
    data = blocks(QuantizedWeight(values, np.array([[0.5]], np.float16), "int4", 32), "a layer")
    np.testing.assert_array_equal(unpacked(data, "int4"), -4.0)


@pytest.mark.parametrize(("given", "said"), [
    (weight("int4", 16), "128 inputs in groups of 16.*`group_size: 32`"),
    (weight("int8", None, 40), "40 inputs"),
    (weight("fp8", None), "fp8 weights.*`weights: int4` or `weights: int8`"),
    (QuantizedWeight(np.ones((1, 32)), np.array([1e-9], np.float32), "int8"), "scales that float16 cannot hold"),
], ids=["group", "width", "fp8", "scale"])  # fmt: skip
def test_what_they_cannot_hold_is_refused(given, said):
    with pytest.raises(BlockError, match=f"layer 7 has.*{said}|layer 7 has {said}"):
        blocks(given, "layer 7")
