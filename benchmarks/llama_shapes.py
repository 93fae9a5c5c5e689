"""A language model of OpenVLA-7B's shapes with random weights in llama.cpp's own 4-bit type (Q4_0): how fast the runtime that
is made for decoding decides on the same computer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from benchmarks.openvla_shapes import Shapes
from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.engine.gguf_file import LINEAR, NORMS, words_of, write_language
from vla_edge.engine.language import Language
from vla_edge.engine.product import in_precision
from vla_edge.policy.bins import BINS

GROUP = 32  # inputs that share a scale in Q4_0


class _Layers(Mapping):
    """Every layer of one shape is the same matrix: that is as fast, and only one of each is in memory."""

    def __init__(self, shapes: Shapes):
        attention = (shapes.width, shapes.width)
        sizes = {"mlp.gate": (shapes.hidden, shapes.width), "mlp.down": (shapes.width, shapes.hidden)}
        sizes["mlp.up"] = sizes["mlp.gate"]
        self._sizes = {f"layers.{i}.{name}": sizes.get(name, attention) for i in range(shapes.layers) for name in LINEAR}
        self._sizes["head"] = (BINS, shapes.width)
        rng = np.random.default_rng(0)
        self._made = {
            size: in_precision(rng.normal(0, size[1] ** -0.5, size).astype(np.float32), "int4 weights", GROUP)
            for size in set(self._sizes.values())
        }

    def __getitem__(self, name: str) -> CompressedLinear:
        return self._made[self._sizes[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def write_llama(path: Path, shapes: Shapes, context: int) -> Path:
    """The GGUF file `path`, written once."""
    if words_of(path).is_file():  # written last
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, one = np.random.default_rng(1), np.ones(shapes.width, np.float32)
    norms = {"norm": one, **{f"layers.{i}.{name}": one for i in range(shapes.layers) for name in NORMS}}
    table = rng.normal(0, 0.02, (shapes.vocabulary, shapes.width)).astype(np.float32)
    layers = _Layers(shapes)
    language = Language(shapes.heads, shapes.heads, 1e-5, 1e4, context, layers, norms, table[:BINS].copy(), table)
    return write_language(language, path)
