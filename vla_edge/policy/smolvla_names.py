"""LeRobot's tensors of a SmolVLA and ours, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_edge.policy.smolvla import SmolVLA, SmolVLAConfig
from vla_edge.policy.smolvla_positions import read_table, spare_table
from vla_edge.policy.smolvla_shapes import expert_hidden
from vla_edge.policy.weights import OnDemand

_VLM = "model.vlm_with_expert.vlm.model."
_VISION = _VLM + "vision_model."
_TEXT = _VLM + "text_model."
_EXPERT = "model.vlm_with_expert.lm_expert."

_HEAD, _EXPERT_HEAD = "model.vlm_with_expert.vlm.lm_head.weight", _EXPERT + "lm_head.weight"

_ENCODER_LAYER = {
    "attention_norm": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_DECODER_LAYER = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_SINGLE = {
    "vision.encoder.patch_embedding": _VISION + "embeddings.patch_embedding",
    "vision.encoder.position_embedding": _VISION + "embeddings.position_embedding",
    "vision.encoder.norm": _VISION + "post_layernorm",
    "vision.connector": _VLM + "connector.modality_projection.proj",
    "prefix.embedding": _TEXT + "embed_tokens",
    "prefix.state_proj": "model.state_proj",
    "denoise.action_in": "model.action_in_proj",
    "denoise.action_out": "model.action_out_proj",
    "denoise.mlp_out": "model.action_time_mlp_out",
    "denoise.norm": _EXPERT + "norm",
}
_EXPERT_MLP = re.compile(r"denoise\.layers\.\d+\.mlp\.(gate|up|down)\.weight")
_TIME_MLP = "model.action_time_mlp_in"
_POSITIONS = "vision.encoder.position_embedding.weight"


def lerobot_name(name: str, config: SmolVLAConfig) -> str:
    """LeRobot's name of our parameter (not of the two halves of the action-time MLP's first layer)."""
    module, _, kind = name.rpartition(".")
    if module in _SINGLE:
        return f"{_SINGLE[module]}.{kind}"
    if match := re.fullmatch(r"vision\.encoder\.layers\.(\d+)\.(.+)", module):
        return f"{_VISION}encoder.layers.{match[1]}.{_ENCODER_LAYER[match[2]]}.{kind}"
    if match := re.fullmatch(r"prefix\.layers\.(\d+)\.(.+)", module):
        return f"{_TEXT}layers.{match[1]}.{_DECODER_LAYER[match[2]]}.{kind}"
    if match := re.fullmatch(r"prefix\.last(?:_norm|\.([kv]))", module):
        part = _DECODER_LAYER[match[1] or "attention_norm"]
        return f"{_TEXT}layers.{config.text_layers - 1}.{part}.{kind}"
    if match := re.fullmatch(r"prefix\.cross\.(\d+)\.([kv])", module):
        return f"{_EXPERT}layers.{int(match[1]) // config.expert_every}.{_DECODER_LAYER[match[2]]}.{kind}"
    if match := re.fullmatch(r"denoise\.layers\.(\d+)\.(.+)", module):
        return f"{_EXPERT}layers.{match[1]}.{_DECODER_LAYER[match[2]]}.{kind}"
    raise KeyError(name)


def lerobot_names(policy: SmolVLA) -> set[str]:
    """LeRobot's tensors that `from_lerobot` reads."""
    halves = {"time.mlp_in.weight", "denoise.mlp_in.weight", "time.mlp_in.bias"}
    names = {lerobot_name(name, policy.config) for name in policy.state_dict() if name not in halves}
    return names | {f"{_TIME_MLP}.weight", f"{_TIME_MLP}.bias"}


def is_unused(name: str) -> bool:
    """Whether a tensor of the backbone's text half that is not read may be there: layers that were cut off, what comes
    after the last keys and values, the language model head."""
    return name.startswith(_TEXT) or name in (_HEAD, _EXPERT_HEAD)


def from_lerobot(
    tensors: Mapping[str, Tensor], policy: SmolVLA, vision_dtype: torch.dtype = torch.float32
) -> Mapping[str, Tensor]:
    """Our state dict from LeRobot's tensors, each made when it is asked for.

    Args:
        vision_dtype: what LeRobot runs the vision tower in, which decides the positions its patches read.

    Asking for one raises
        KeyError: it is missing, named as LeRobot names it.
        ValueError, RuntimeError: it cannot be of this shape.
    """
    config, width, likes = policy.config, policy.config.expert_width, policy.state_dict()

    def made(name: str) -> Tensor:
        if name == "time.mlp_in.weight":
            return tensors[f"{_TIME_MLP}.weight"][:, width:]
        if name == "denoise.mlp_in.weight":
            return tensors[f"{_TIME_MLP}.weight"][:, :width]
        if name == "time.mlp_in.bias":
            return tensors[f"{_TIME_MLP}.bias"]
        tensor = tensors[lerobot_name(name, config)]
        if name == _POSITIONS:
            return read_table(tensor, policy.vision.encoder.grid, vision_dtype)
        if _EXPERT_MLP.fullmatch(name):
            tensor = _used(name, tensor, likes[name].shape)
        return tensor.reshape(likes[name].shape) if name.endswith("patch_embedding.weight") else tensor

    return OnDemand(likes, made)


def to_lerobot(policy: SmolVLA) -> dict[str, Tensor]:
    """LeRobot's complete set of tensors, the table of positions with a spare row and column (`smolvla_positions`).

    Those it holds but never uses (the last text layer's output half, the final text norm, the language model head) are
    ones where they scale and zeros elsewhere. So are the channels that an expert lacks to the width LeRobot gives it.
    """
    c, ours = policy.config, policy.state_dict()
    halves = ("time.mlp_in.weight", "denoise.mlp_in.weight", "time.mlp_in.bias")
    tensors = {
        lerobot_name(name, c): _padded(name, tensor, c) if _EXPERT_MLP.fullmatch(name) else tensor
        for name, tensor in ours.items()
        if name not in halves
    }
    patch = _VISION + "embeddings.patch_embedding.weight"
    tensors[patch] = tensors[patch].reshape(c.vision_width, 3, c.patch_size, c.patch_size)
    positions = lerobot_name(_POSITIONS, c)
    tensors[positions] = spare_table(tensors[positions], policy.vision.encoder.grid)
    tensors[f"{_TIME_MLP}.weight"] = torch.cat([ours["denoise.mlp_in.weight"], ours["time.mlp_in.weight"]], dim=1)
    tensors[f"{_TIME_MLP}.bias"] = ours["time.mlp_in.bias"]

    last = f"{_TEXT}layers.{c.text_layers - 1}."
    heads = c.heads * c.head_dim
    tensors[last + "self_attn.q_proj.weight"] = torch.zeros(heads, c.text_width)
    tensors[last + "self_attn.o_proj.weight"] = torch.zeros(c.text_width, heads)
    tensors[last + "post_attention_layernorm.weight"] = torch.ones(c.text_width)
    for part in ("gate_proj", "up_proj"):
        tensors[f"{last}mlp.{part}.weight"] = torch.zeros(c.text_hidden, c.text_width)
    tensors[last + "mlp.down_proj.weight"] = torch.zeros(c.text_width, c.text_hidden)
    tensors[_TEXT + "norm.weight"] = torch.ones(c.text_width)
    tensors[_HEAD] = torch.zeros(c.vocabulary, c.text_width)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _padded(name: str, tensor: Tensor, config: SmolVLAConfig) -> Tensor:
    """An expert's feed-forward weight with channels of zeros up to the width that LeRobot gives it."""
    lacking = expert_hidden(config.expert_width) - config.expert_hidden
    return F.pad(tensor, (0, lacking) if ".down." in name else (0, 0, 0, lacking))


def _used(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `_padded`."""
    used = tensor[: shape[0], : shape[1]]
    if used.count_nonzero() != tensor.count_nonzero():
        raise ValueError(f"{name} is more than {tuple(shape)}, which is what vla_edge.json tells of it")
    return used
