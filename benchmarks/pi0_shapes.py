"""A checkpoint of pi0's own shapes with random weights, as openpi's conversion to PyTorch writes it, in bfloat16: for timing
and memory, never for a robot. Smaller ones have the same layout."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.openvla_shapes import JOINTS, WORDS, random_values

# github.com/Physical-Intelligence/openpi: gemma_2b, gemma_300m, SigLIP So400m/14
SIZES = {
    "image_size": 224, "patch_size": 14, "vision_width": 1152, "vision_hidden": 4304, "vision_layers": 27,
    "vision_heads": 16, "vocabulary": 257152, "text_width": 2048, "text_hidden": 16384, "text_layers": 18, "heads": 8,
    "kv_heads": 1, "head_dim": 256, "expert_width": 1024, "expert_hidden": 4096, "chunk_size": 50, "max_state_dim": 32,
    "max_action_dim": 32, "language_length": 48, "min_period": 4e-3, "max_period": 4.0,
}  # fmt: skip


def write_pi0(directory: Path, cameras: int = 1, **changes) -> Path:
    """The checkpoint `directory`, written once.

    Args:
        changes: other sizes than `SIZES`.
    """
    import torch
    from safetensors.torch import save_file

    from vla_edge.policy.paligemma import PiConfig
    from vla_edge.policy.pi0 import Pi0
    from vla_edge.policy.pi_checkpoint import file_name
    from vla_edge.policy.piecewise import on_meta

    if (directory / "model.safetensors").is_file():
        return directory
    config = PiConfig(cameras=cameras, **SIZES | changes)
    with on_meta():
        shapes = {name: tuple(value.shape) for name, value in Pi0(config).state_dict().items()}
    width = config.expert_width
    for name in ("time.mlp_in.weight", "time.mlp_in.bias", "denoise.mlp_in.weight"):
        del shapes[name]  # in the file they are one layer
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        stored = file_name(name, config)
        if name == "vision.encoder.patch_embedding.weight":
            shape = (shape[0], 3, config.patch_size, config.patch_size)
        tensors[stored] = random_values(name, shape, generator)
        if name.startswith(("prefix", "denoise")) and name.endswith("norm.weight"):
            tensors[stored].zero_()  # Gemma stores the difference to one
    tensors["action_time_mlp_in.weight"] = random_values("action_time_mlp_in.weight", (width, 2 * width), generator)
    tensors["action_time_mlp_in.bias"] = torch.zeros(width, dtype=torch.bfloat16)
    (directory / "assets" / "random").mkdir(parents=True, exist_ok=True)
    _write_small(directory, config)
    partial = directory / ".model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")
    return directory


def _write_small(directory: Path, config) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "\n", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    statistics = {"mean": [0.0] * 32, "std": [1.0] * 32, "q01": [-1.0] * 32, "q99": [1.0] * 32}
    view = {"height": 224, "width": 224, "crop": [0, 0, 224, 224]}
    files = {
        "config.json": {
            "action_dim": config.max_action_dim, "action_horizon": config.chunk_size, "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m", "precision": "bfloat16",
        },
        "vla_edge.json": {
            "joint_names": list(JOINTS), "dt": 0.05, "relative_actions": False,
            "cameras": {f"camera{number}": view for number in range(1, config.cameras + 1)},
        },
        "assets/random/norm_stats.json": {"norm_stats": {"state": statistics, "actions": statistics}},
    }  # fmt: skip
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2))
