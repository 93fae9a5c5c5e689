"""A language model of compressed layers -> the directory of a Hugging Face Llama, as other runtimes load it.

The vocabulary is the tokenizer's. Only the 256 tokens of actions can be written: rows of the head that belong to other
words are zeros, and a runtime has to be told to choose among the 256 (`action_tokens`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vla_edge.engine.language import Language
from vla_edge.engine.packed_layers import Grid, Layout, in_half, pack_layer
from vla_edge.policy.bins import BINS
from vla_edge.policy.openvla_checkpoint import LLAMA_LAYER
from vla_edge.policy.weights import INDEX_FILE

SHARD = 2 << 30  # bytes of a file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
# messages as they are: what a policy is asked is a prompt of its own
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
HEAD = "lm_head"


def write_llama(directory: Path, language: Language, layout: Layout, first_action: int, tokenizer: Path) -> None:
    """Write `language` to an empty `directory`; some layers of it in memory at a time.

    Args:
        first_action: id of the first of the tokens of actions. tokenizer: directory with the tokenizer's files.

    Raises:
        LayoutError: the layout cannot hold a layer.
    """
    grids, floats, scaled = {}, [HEAD], False
    for name in (name for name in language.linear if name != "head"):
        layer = language.linear[name]
        scaled = scaled or layer.input_scale is not None
        if layer.quantized:
            grids[llama_name(name)] = Grid.of(layer)
        else:
            floats.append(llama_name(name))
    layout.check(grids)
    _write_shards(directory, _tensors(language, layout, first_action, scaled))
    config = _config(language)
    if grids:
        for file, said in layout.describe(grids, floats, scaled).items():
            if file == "config.json":
                config["quantization_config"] = said
            else:
                _write_json(directory / file, said)
    _write_json(directory / "config.json", config)
    for file in TOKENIZER_FILES:
        if (tokenizer / file).is_file():
            shutil.copyfile(tokenizer / file, directory / file)
    (directory / "chat_template.jinja").write_text(CHAT, encoding="utf-8")


def write_action_tokens(directory: Path, first_action: int) -> None:
    """The ids of the tokens of actions, as TensorRT Edge-LLM takes a reduced vocabulary."""
    from safetensors.numpy import save_file

    directory.mkdir()
    file = directory / "vocab_map.safetensors"
    save_file({"vocab_map": np.arange(first_action, first_action + BINS, dtype=np.int32)}, file)
    file.chmod(0o644)


def llama_name(name: str) -> str:
    """Of one of `Language.linear` or `Language.norms`."""
    if name == "head":
        return HEAD
    if name == "norm":
        return "model.norm"
    _, number, inner = name.split(".", 2)
    return f"model.layers.{number}.{LLAMA_LAYER[inner]}"


def _tensors(language: Language, layout: Layout, first: int, scaled: bool) -> Iterator[tuple[str, np.ndarray]]:
    words = language.embedding.copy()
    words[first : first + BINS] = language.words
    yield "model.embed_tokens.weight", in_half("the table of words", words)
    del words
    for name, norm in language.norms.items():
        yield f"{llama_name(name)}.weight", in_half(name, norm)
    for name in language.linear:
        if name == "head":
            continue
        layer = language.linear[name]
        for part, tensor in pack_layer(name, layer, layout, scaled and layer.quantized).items():
            yield f"{llama_name(name)}.{part}", tensor
    head = np.zeros(language.embedding.shape, np.float16)
    head[first : first + BINS] = in_half("the head", language.linear["head"].effective_weight())
    yield f"{HEAD}.weight", head


def _config(language: Language) -> dict:
    vocabulary, width = language.embedding.shape
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "torch_dtype": "float16",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": language.linear["layers.0.mlp.up"].shape[0],
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": width // language.heads,
        "rms_norm_eps": language.eps,
        "rope_theta": language.wavelength,
        "max_position_embeddings": -(-language.context // 128) * 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write_shards(directory: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """safetensors files of at most SHARD bytes, where a tensor is not larger, and their index."""
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        file = directory / f"{len(shards)}.partial"
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in waiting.items()}, file, {"format": "pt"})
        file.chmod(0o644)  # safetensors keeps them to their owner
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and sum(part.nbytes for part in waiting.values()) + tensor.nbytes > SHARD:
            flush()
        waiting[name] = tensor
        total += tensor.nbytes
    flush()
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"{number}.partial").rename(directory / file)
        places |= dict.fromkeys(names, file)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
