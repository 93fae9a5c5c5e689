"""A checkpoint of OpenVLA-7B's own shapes with random weights, in bfloat16 and shards: for timing and memory, never for a
robot. Smaller ones have the same layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

JOINTS = tuple(f"joint_{index}" for index in range(7))
WORDS = ("in", "what", "action", "should", "robot", "take", "to", "touch", "the", "red", "green", "cube", "out")
_TIMM = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]


@dataclass(frozen=True)
class Shapes:
    """Of a checkpoint; the defaults are openvla/openvla-7b's.

    Attributes:
        towers: width, hidden, blocks of DINOv2 and SigLIP; of each the last block is in the file and not run.
    """

    layers: int = 32
    width: int = 4096
    hidden: int = 11008
    heads: int = 32
    vocabulary: int = 32064
    image_size: int = 224
    towers: tuple[tuple[int, int, int], ...] = ((1024, 4096, 24), (1152, 4304, 27))

    def tensors(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Shapes by name, a part of the model at a time."""
        places = (self.image_size // 14) ** 2
        for prefix, (width, hidden, blocks) in zip(("featurizer", "fused_featurizer"), self.towers):
            tower = f"vision_backbone.{prefix}"
            first = prefix == "featurizer"
            yield {
                f"{tower}.patch_embed.proj.weight": (width, 3, 14, 14), f"{tower}.patch_embed.proj.bias": (width,),
                f"{tower}.pos_embed": (1, places, width), f"{tower}.norm.weight": (width,), f"{tower}.norm.bias": (width,),
                **({f"{tower}.cls_token": (1, 1, width), f"{tower}.reg_token": (1, 4, width)} if first else {}),
            }  # fmt: skip
            for number in range(blocks):
                yield _block(f"{tower}.blocks.{number}", width, hidden, first)
        seen = sum(width for width, _, _ in self.towers)
        sizes = (seen, 4 * seen, self.width, self.width)
        yield {
            f"projector.fc{i}.{kind}": shape
            for i, (rows, columns) in enumerate(zip(sizes[1:], sizes), 1)
            for kind, shape in (("weight", (rows, columns)), ("bias", (rows,)))
        }
        text = "language_model.model"
        yield {f"{text}.embed_tokens.weight": (self.vocabulary, self.width), f"{text}.norm.weight": (self.width,)}
        for number in range(self.layers):
            layer = f"{text}.layers.{number}"
            yield {
                f"{layer}.input_layernorm.weight": (self.width,), f"{layer}.post_attention_layernorm.weight": (self.width,),
                **{f"{layer}.self_attn.{part}_proj.weight": (self.width, self.width) for part in "qkvo"},
                **{f"{layer}.mlp.{part}_proj.weight": (self.hidden, self.width) for part in ("gate", "up")},
                f"{layer}.mlp.down_proj.weight": (self.width, self.hidden),
            }  # fmt: skip
        yield {"language_model.lm_head.weight": (self.vocabulary, self.width)}


def _block(name: str, width: int, hidden: int, scaled: bool) -> dict[str, tuple[int, ...]]:
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    found = {f"{name}.{part}.weight": shape for part, shape in layers.items()}
    found |= {f"{name}.{part}.bias": (shape[0],) for part, shape in layers.items()}
    found |= {f"{name}.norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    return found | ({f"{name}.ls{i}.scale_factor": (width,) for i in (1, 2)} if scaled else {})


def write_openvla(directory: Path, shapes: Shapes = Shapes()) -> Path:
    """The checkpoint `directory`, written once."""
    return write_once(directory, shapes.tensors, lambda: _write_small(directory, shapes))


def write_once(
    directory: Path,
    parts: Callable[[], Iterable[Mapping[str, tuple[int, ...]]]],
    write_small: Callable[[], None],
    shard_bytes: int = 2 << 30,
) -> Path:
    """A checkpoint `directory` of random weights, one shard in memory at a time; one that is whole stays as it is.

    Args:
        parts: tensors' shapes by name, a part of the model at a time. write_small: everything that is not weights.
    """
    import torch
    from safetensors.torch import save_file

    if (directory / "model.safetensors.index.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    shard: dict = {}

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for part in parts():
        for name, shape in part.items():
            shard[name] = random_values(name, shape, generator)
        if sum(tensor.numel() * 2 for tensor in shard.values()) > shard_bytes:
            flush()
    flush()
    write_small()
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))  # last: what is there is whole
    return directory


def random_values(name: str, shape: tuple[int, ...], generator):
    """Bounded activations: norms are one, and layers keep the size of what reaches them."""
    import torch

    if len(shape) == 1:
        one = name.endswith(".weight") or name.endswith("scale_factor")
        return torch.full(shape, 1.0 if one else 0.0, dtype=torch.bfloat16)
    scale = 0.02 if "embed" in name and len(shape) != 4 else float(np.prod(shape[1:])) ** -0.5
    return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)


def write_words(directory: Path, words: Iterable[str]) -> None:
    """tokenizer.json of whole words in small letters, by their order; "<unk>" is among them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def _write_small(directory: Path, shapes: Shapes) -> None:
    write_words(directory, ("<unk>", "<s>", "</s>", *WORDS))
    bounds = {"q01": [-0.1] * 7, "q99": [0.1] * 7, "min": [-0.1] * 7, "max": [0.1] * 7, "mask": [True] * 7}
    config = {
        "model_type": "openvla", "image_sizes": [shapes.image_size] * 2, "timm_model_ids": _TIMM,
        "use_fused_vision_backbone": True, "image_resize_strategy": "resize-naive", "n_action_bins": 256,
        "pad_to_multiple_of": 64, "norm_stats": {"random": {"action": bounds}},
        "text_config": {
            "model_type": "llama", "hidden_size": shapes.width, "intermediate_size": shapes.hidden,
            "num_hidden_layers": shapes.layers, "num_attention_heads": shapes.heads, "vocab_size": shapes.vocabulary,
            "rms_norm_eps": 1e-5,
        },
    }  # fmt: skip
    robot = {
        "joint_names": list(JOINTS), "dt": 0.2, "relative_actions": True,
        "cameras": {"head": {"height": 224, "width": 224, "crop": [0, 0, 224, 224]}},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "vla_edge.json").write_text(json.dumps(robot, indent=2))
