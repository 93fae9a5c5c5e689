"""The stage that reads a prompt and writes all tokens -> GGUF, the file of llama.cpp: quantized weights as they are.

The vocabulary of the file is the 256 tokens of actions, the only ones that are ever written. What a prompt says comes as
embeddings, of pictures and of words alike; the table of the words lies beside the file, and only the rows that a prompt
needs are read from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.engine.backends import BackendError
from vla_edge.engine.gguf_blocks import TYPES, BlockError, blocks
from vla_edge.engine.language import Language, language_of
from vla_edge.policy.bins import BINS

# ours -> GGUF's names within a layer
LINEAR = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "out": "attn_output",
    "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
}  # fmt: skip
NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def words_of(path: str | Path) -> Path:
    """The table of embeddings beside a GGUF file."""
    return Path(path).with_suffix(".words.npy")


def export_language(stage, layers: Mapping[str, CompressedLinear], path: str | Path) -> Path:
    """Write stage "generate" of `policy.openvla` with its `layers`.

    Args:
        layers: linear layers by their name in `prefill`; those not named stay in float32.

    Raises:
        BlockError: what became of a layer cannot be written, and which recipe can.
    """
    return write_language(language_of(stage.module.prefill, stage.module.decode.words, layers), path)


def write_language(language: Language, path: str | Path) -> Path:
    """Write `language` to `path`, and the words of its prompts beside it; one matrix in memory at a time.

    Raises:
        BlockError: a layer cannot be written, and which recipe can.
        BackendError: the package that writes such files is missing.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise BackendError("llama.cpp's files are written by the package gguf; install it with pip install gguf") from error
    for name, layer in language.linear.items():
        _check(name, layer)
    width = language.words.shape[1]
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(language.layers)
    writer.add_context_length(language.context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(language.linear["layers.0.mlp.up"].shape[0])
    writer.add_head_count(language.heads)
    writer.add_head_count_kv(language.kv_heads)
    writer.add_layer_norm_rms_eps(language.eps)
    writer.add_rope_dimension_count(width // language.heads)
    writer.add_rope_freq_base(language.wavelength)
    writer.add_vocab_size(BINS)
    writer.add_tokenizer_model("none")
    for name, make, kind in _tensors(language):
        array = make()
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, make, _ in _tensors(language):
        writer.write_tensor_data(make())
    writer.close()
    np.save(words_of(path), language.embedding, allow_pickle=False)
    return Path(path)


def _tensors(language: Language) -> Iterator[tuple]:
    """(name in GGUF, what makes its array, type), in the order of the file."""
    yield "token_embd.weight", lambda: language.words, "F32"
    yield "output_norm.weight", lambda: language.norms["norm"], "F32"
    yield _linear("output", language.linear["head"], None)
    for index in range(language.layers):
        for ours, theirs in NORMS.items():
            norm = language.norms[f"layers.{index}.{ours}"]
            yield f"blk.{index}.{theirs}.weight", lambda norm=norm: norm, "F32"
        for ours, theirs in LINEAR.items():
            heads = {"q": language.heads, "k": language.kv_heads}.get(ours)
            order = None if heads is None else _pairs(language.linear[f"layers.{index}.{ours}"].shape[0], heads)
            yield _linear(f"blk.{index}.{theirs}", language.linear[f"layers.{index}.{ours}"], order)


def _linear(name: str, layer: CompressedLinear, order: np.ndarray | None) -> tuple:
    """A matrix with its rows in `order`."""

    def make() -> np.ndarray:
        array = blocks(layer.weight, name) if layer.quantized else layer.weight
        array = array if order is None else array[order]
        return np.ascontiguousarray(array).view(np.uint8) if layer.precision == "bfloat16" else array

    return f"{name}.weight", make, TYPES[layer.precision] if layer.quantized else FLOATS[layer.precision]


def _pairs(rows: int, heads: int) -> np.ndarray:
    """The order in which llama.cpp wants the channels of each head: it rotates neighbours, we channel i with i + hd / 2."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _check(name: str, layer: CompressedLinear) -> None:
    parts: Sequence[tuple[str, object]] = (
        ("rounds its inputs", layer.activation), ("has a low-rank branch", layer.low_rank),
        ("scales its inputs", layer.input_scale), ("has a bias", layer.bias),
    )  # fmt: skip
    for what, part in parts:
        if part is not None:
            raise BlockError(
                f"{name} {what}, which llama.cpp's files do not say; quantize its weights alone, with `weights: int4` or "
                "`weights: int8` and `group_size: 32`"
            )
    if layer.quantized:  # a row tells of all but scales, which are looked at when they are written
        weight = layer.weight
        blocks(replace(weight, values=weight.values[:1], scales=weight.scales[:1]), name)

