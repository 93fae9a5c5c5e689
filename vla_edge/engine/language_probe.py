"""A Llama of one layer that is asked for one token, in any precision, and what numpy makes of it: what runtimes that read
whole language models are tried with, as others are with one product.
"""

from __future__ import annotations

import numpy as np

from vla_edge.engine.backends import StageInterface
from vla_edge.engine.gguf_file import LINEAR
from vla_edge.engine.language import Language
from vla_edge.engine.product import in_precision
from vla_edge.policy.bins import BINS
from vla_edge.policy.stages import TensorSpec

PRECISIONS = ("float32", "float16", "int8 weights", "int4 weights")
WIDTH, HIDDEN, HEADS, WORDS, GROUP, EPS = 64, 96, 4, 8, 32, 1e-5


def language(precision: str) -> Language:
    """Random, all its matrices as one of `PRECISIONS`."""
    rng = np.random.default_rng(0)
    shapes = {"mlp.gate": (HIDDEN, WIDTH), "mlp.up": (HIDDEN, WIDTH), "mlp.down": (WIDTH, HIDDEN)}
    named = {f"layers.0.{name}": shapes.get(name, (WIDTH, WIDTH)) for name in LINEAR} | {"head": (BINS, WIDTH)}

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    linear = {name: in_precision(random(*shape), precision, GROUP) for name, shape in named.items()}
    norms = ("layers.0.attention_norm", "layers.0.mlp_norm", "norm")
    scales = {name: rng.uniform(0.5, 1.5, WIDTH).astype(np.float32) for name in norms}
    return Language(HEADS, HEADS, EPS, 10_000.0, 4, linear, scales, random(BINS, WIDTH), random(WORDS, WIDTH))


def interface() -> StageInterface:
    """A picture of one token and one word -> scores of one token."""
    image, words = TensorSpec("image_tokens", (1, 1, WIDTH)), TensorSpec("lang_tokens", (1, 1), "int64")
    prompt = image, words, TensorSpec("lang_mask", (1, 1), "bool")
    return StageInterface("generate", prompt, (TensorSpec("token_scores", (1, 1, BINS)),))


def inputs() -> dict[str, np.ndarray]:
    """Of `interface`: the picture is the word itself, so that whatever looks at either sees the same."""
    word = np.full((1, 1), 3)
    return {
        "image_tokens": language("float32").embedding[word], "lang_tokens": word, "lang_mask": np.ones((1, 1), bool)
    }  # fmt: skip


def expected(model: Language) -> np.ndarray:
    """(1, 1, 256) scores. Both tokens have the same values, so attention gives these, however it weighs the two."""
    weight = {name: layer.dense_weight() for name, layer in model.linear.items()}
    x = model.embedding[3].astype(np.float64)
    normed = _norm(x, model.norms["layers.0.attention_norm"])
    x = x + weight["layers.0.out"] @ (weight["layers.0.v"] @ normed)
    normed = _norm(x, model.norms["layers.0.mlp_norm"])
    gate = weight["layers.0.mlp.gate"] @ normed
    x = x + weight["layers.0.mlp.down"] @ (gate / (1 + np.exp(-gate)) * (weight["layers.0.mlp.up"] @ normed))
    return (weight["head"] @ _norm(x, model.norms["norm"]))[None, None]


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + EPS) * scale
