"""A GR00T N1.7 out of Isaac-GR00T's Hugging Face directory or LeRobot's `pretrained_model/`.

Both use the same names, but for a `_groot_model.` in front of LeRobot's. Sizes are those of the tensors; heads, which no
tensor tells, those of the backbone's config.json and of the policy's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json
from vla_edge.policy.families import Description
from vla_edge.policy.groot17_layout import IMAGE, backbone17_directory, groot17_spec, read_processing17
from vla_edge.policy.groot_checkpoint import (
    TEXT_LAYER,
    check_head,
    embodied,
    fitting_tokenizer,
    head_name,
    head_shaped,
    head_sizes,
    image_places,
    own_name,
    plain,
    text_sizes,
)
from vla_edge.policy.groot_layout import head_config, tokenizer_path
from vla_edge.policy.lerobot_layout import check_options
from vla_edge.policy.robot_facts import RobotFacts
from vla_edge.policy.weights import OnDemand, Weights

if TYPE_CHECKING:
    import torch

    from vla_edge.policy.checkpoint import Checkpoint
    from vla_edge.policy.groot17 import Groot17Config

_MODEL = "backbone.model.model."
_VISION, _TEXT = f"{_MODEL}visual.", f"{_MODEL}language_model."
_BLOCK = {
    "attention_norm": "norm1", "q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "out": "attn.proj", "mlp_norm": "norm2",
    "mlp.up": "mlp.linear_fc1", "mlp.down": "mlp.linear_fc2",
}  # fmt: skip
_MERGER = {"norm": "norm", "up": "linear_fc1", "down": "linear_fc2"}
_SINGLE = {
    "vision.encoder.patch_embedding": f"{_VISION}patch_embed.proj",
    "prefix.embedding": f"{_TEXT}embed_tokens",
}
_EMBEDDING, _UNUSED_HEAD = f"{_TEXT}embed_tokens.weight", "backbone.model.lm_head.weight"
_PLACES, _TABLE = "vision.encoder.position_embedding", f"{_VISION}pos_embed.weight"
_VISION_OPTIONS = {"hidden_act": "gelu_pytorch_tanh", "spatial_merge_size": 2, "temporal_patch_size": 2}
_TEXT_OPTIONS = {"hidden_act": "silu", "attention_bias": False}
_ACTION_OPTIONS = {"use_vlln": True, "reproject_vision": False}
_EPS = 1e-6  # of the vision transformer's norms; no config.json says it


def describe(directory: Path, config: Document) -> Description:
    """See `families`."""
    backbone = backbone17_directory(directory, config)
    spec = groot17_spec(directory, config, backbone)
    return Description(spec, tokenizer_path(backbone), read_json(backbone / "config.json"))


def build(checkpoint: Checkpoint, weights: Weights):
    """See `families`."""
    from vla_edge.policy.groot17 import Groot17

    return Groot17(groot17_config(checkpoint, stored(weights)))


def tensors(policy, checkpoint: Checkpoint, weights: Weights) -> OnDemand:
    """See `families`."""
    number = read_processing17(checkpoint.directory, checkpoint.config, RobotFacts(checkpoint.directory)).embodiment
    rows, columns = policy.config.grid

    def shaped(name: str, tensor, like, number: int):
        if name == _PLACES:
            return policy.vision.encoder.squares(placed(tensor, 2 * rows, 2 * columns))
        return _shaped(name, tensor, like, number)

    return embodied(policy, stored(weights), number, file_name, shaped, _is_unused)


def stored(weights: Weights) -> Weights:
    """Under Isaac-GR00T's names. What embeds words is the unused head over them too, and files may have it as that alone."""
    found = plain(weights)
    if _EMBEDDING in found:
        return found
    return found.renamed(lambda name: _EMBEDDING if (own := own_name(name)) == _UNUSED_HEAD else own)


def groot17_config(checkpoint: Checkpoint, weights: Weights) -> Groot17Config:
    """Shapes for `Groot17`.

    Raises:
        CheckpointError: a tensor is missing, or the shapes contradict a config.json or ask for what is not done here.
    """
    from vla_edge.policy.groot17 import Groot17Config

    spec, backbone = checkpoint.spec, checkpoint.backbone
    head = head_config(checkpoint.directory, checkpoint.config)
    _check(backbone, head)
    vision, text = backbone["vision_config"], backbone["text_config"]
    dit, adapter = head["diffusion_model_cfg"], head["vl_self_attention_cfg"]
    vision_width, *_, patch = weights.shape(f"{_VISION}patch_embed.proj.weight")
    rotary = text.get("rope_scaling") or text.get("rope_parameters") or {}
    places = tuple(rotary.get("mrope_section") or ())
    if len(places) != 3 or rotary.get("rope_type", "default") != "default" or not rotary.get("mrope_interleaved", True):
        raise CheckpointError(f"{backbone.path} turns queries and keys in another way than Qwen3-VL; copy it again")
    language = text_sizes(weights, _TEXT, text.count("head_dim"), head)
    merged = tuple(weights.shape(f"{_VISION}merger.linear_fc{number}.weight")[::-1] for number in (1, 2))
    return Groot17Config(
        cameras=len(spec.cameras),
        image_size=spec.cameras[0].height,
        image_columns=spec.cameras[0].width,
        patch_size=patch,
        shuffle=1,
        vision_width=vision_width,
        vision_hidden=weights.shape(f"{_VISION}blocks.0.mlp.linear_fc1.weight")[0],
        vision_layers=weights.count(f"{_VISION}blocks.{{}}.mlp.linear_fc1.weight"),
        vision_heads=vision.count("num_heads"),
        vision_eps=_EPS,
        connector=merged,
        deep=tuple(vision["deepstack_visual_indexes"]),
        **language,
        text_eps=text["rms_norm_eps"],
        wavelength=float(text.get("rope_theta") or rotary["rope_theta"]),
        sections=places,
        image_places=image_places(
            checkpoint, fitting_tokenizer(checkpoint, language["vocabulary"]), IMAGE, backbone["image_token_id"]
        ),
        language_length=spec.tokenizer_max_length,
        future_tokens=0,
        time_buckets=head.get("num_timestep_buckets", 1000),
        chunk_size=head.count("action_horizon"),
        text_every=head.count("attend_text_every_n_blocks") if head.get("use_alternate_vl_dit", True) else 0,
        **head_sizes(weights, dit, adapter, spec),
    )


def file_name(name: str, config: Groot17Config) -> str:
    """The original's name of our parameter; queries, keys and values of the vision transformer are one tensor there."""
    module, _, kind = name.rpartition(".")
    if name == _PLACES:
        return _TABLE
    if module in _SINGLE:
        return f"{_SINGLE[module]}.{kind}"
    if match := re.fullmatch(r"vision\.encoder\.layers\.(\d+)\.(.+)", module):
        return f"{_VISION}blocks.{match[1]}.{_BLOCK[match[2]]}.{kind}"
    if match := re.fullmatch(r"vision\.merger\.(.+)", module):
        return f"{_VISION}merger.{_MERGER[match[1]]}.{kind}"
    if match := re.fullmatch(r"vision\.deep_mergers\.(\d+)\.(.+)", module):
        return f"{_VISION}deepstack_merger_list.{match[1]}.{_MERGER[match[2]]}.{kind}"
    if match := re.fullmatch(r"prefix\.layers\.(\d+)\.(.+)", module):
        return f"{_TEXT}layers.{match[1]}.{TEXT_LAYER[match[2]]}.{kind}"
    return head_name(name, config)


def placed(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns, width): a square table of embeddings (side**2, width), bilinear, its corners on the corners."""
    from torch.nn import functional as F

    side = int(table.shape[0] ** 0.5)
    square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, (rows, columns), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)


def _shaped(name: str, tensor, like, number: int):
    """Ours, out of what the file holds; `number` of the embodiment."""
    if match := re.fullmatch(r"vision\.encoder\.layers\.\d+\.([qkv])\.\w+", name):
        return tensor.chunk(3)["qkv".index(match[1])]
    if name == "vision.encoder.patch_embedding.weight":  # both moments of a film are the same picture
        return tensor.float().sum(2).reshape(like.shape)
    return head_shaped(name, tensor, like, number)


def _check(backbone: Document, head: Document) -> None:
    """Raises CheckpointError: an option is set that would change the arithmetic and is not written here."""
    if (kind := backbone.get("model_type", "qwen3_vl")) != "qwen3_vl":
        raise CheckpointError(f"{backbone.path} is of type {kind!r}; this version loads N1.7 on a qwen3_vl")
    check_options(backbone["vision_config"], _VISION_OPTIONS)
    check_options(backbone["text_config"], _TEXT_OPTIONS)
    check_options(head, _ACTION_OPTIONS)
    check_head(head["diffusion_model_cfg"], head["vl_self_attention_cfg"])


def _is_unused(name: str) -> bool:
    """The language model's last norm and its head."""
    return name.startswith(f"{_TEXT}norm.") or name == _UNUSED_HEAD
