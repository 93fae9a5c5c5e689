"""An ACT out of LeRobot's `pretrained_model/`. What only training reads, the encoder of its latent, may be there or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vla_edge.policy.checkpoint_files import CheckpointError, Document
from vla_edge.policy.families import Description
from vla_edge.policy.lerobot_layout import backbone_blocks, check_options, wordless_spec
from vla_edge.policy.robot_facts import RobotFacts
from vla_edge.policy.weights import Weights

if TYPE_CHECKING:
    from vla_edge.policy.act import ACTConfig
    from vla_edge.policy.checkpoint import Checkpoint

_SUPPORTED = {"n_obs_steps": 1, "replace_final_stride_with_dilation": 0, "use_peft": False}
_ACTIVATIONS = ("relu", "gelu")
_STEM, _STAGES = ("backbone.conv1", "backbone.bn1"), tuple(f"backbone.layer{i}" for i in range(1, 5))
_ATTENTION = {"own": "self_attn", "cross": "multihead_attn"}
_ENCODER_NORMS = {"own_norm": "norm1", "mlp_norm": "norm2"}
_DECODER_NORMS = {"own_norm": "norm1", "cross_norm": "norm2", "mlp_norm": "norm3"}
_MLP = {"up": "linear1", "down": "linear2"}
_SINGLE = {
    "vision.projection": "encoder_img_feat_input_proj",
    "act.state_in": "encoder_robot_state_input_proj",
    "act.encoder_norm": "encoder.norm",
    "act.decoder_norm": "decoder.norm",
    "act.action_out": "action_head",
}
_PARAMETERS = {
    "act.latent": "encoder_latent_input_proj.bias",
    "act.first_places": "encoder_1d_feature_pos_embed.weight",
    "act.queries": "decoder_pos_embed.weight",
}
# read by training alone; the latent it multiplies is zero
_UNUSED = re.compile(r"vae_encoder.*|encoder_latent_input_proj\.weight")


def describe(directory: Path, config: Document) -> Description:
    """See `families`."""
    check_options(config, _SUPPORTED)
    robot = RobotFacts(directory)
    return Description(wordless_spec(directory, config, robot, num_steps=1, chunk_size=config.count("chunk_size")))


def build(checkpoint: Checkpoint, weights: Weights):
    """See `families`."""
    from vla_edge.policy.act import ACT

    return ACT(act_config(checkpoint, _plain(weights)))


def tensors(policy, checkpoint: Checkpoint, weights: Weights) -> dict:
    """See `families`."""
    from vla_edge.policy.resnet import part_names, part_tensors, resnet_names

    plain = _plain(weights)
    parts = list(resnet_names(policy.config.blocks, _STEM, _STAGES))
    backbone = "vision.backbone."
    spelled = {name: file_name(name) for name in policy.state_dict() if not name.startswith(backbone)}
    wanted = [tensor for _, *names in parts for tensor in part_names(*names, grouped=False)]
    plain.check([*spelled.values(), *wanted], lambda name: _UNUSED.fullmatch(name) is not None)
    state = {}
    for ours, *names in parts:
        found = part_tensors(plain, *names, grouped=False)
        state |= {f"{backbone}{ours}.{kind}": tensor for kind, tensor in found.items()}
    for name, like in policy.state_dict().items():
        if name in spelled:
            state[name] = _shaped(name, plain[spelled[name]], like)
    return state


def act_config(checkpoint: Checkpoint, weights: Weights) -> ACTConfig:
    """Shapes for `ACT`.

    Raises:
        CheckpointError: a tensor is missing, or config.json asks for what this version does not do.
    """
    from vla_edge.policy.act import ACTConfig

    config, spec = checkpoint.config, checkpoint.spec
    activation = config.get("feedforward_activation", "relu")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{config.path} says feedforward_activation = {activation!r}; this version does {', '.join(_ACTIVATIONS)}"
        )
    hidden, width = weights.shape("encoder.layers.0.linear1.weight")
    camera, heads = spec.cameras[0], config.count("n_heads")
    if width % heads or width % 4:
        raise CheckpointError(f"{config.path} says n_heads = {heads} of a width of {width}; one must divide the other")
    return ACTConfig(
        cameras=len(spec.cameras),
        height=camera.height,
        width=camera.width,
        blocks=backbone_blocks(config),
        channels=weights.shape(f"{_STEM[0]}.weight")[0],
        model_width=width,
        hidden=hidden,
        heads=heads,
        encoder_layers=weights.count("encoder.layers.{}.linear1.weight"),
        decoder_layers=weights.count("decoder.layers.{}.linear1.weight"),
        activation=activation,
        norm_first=bool(config.get("pre_norm", False)),
        state_dim=spec.max_state_dim,
        action_dim=spec.max_action_dim,
        chunk_size=spec.chunk_size,
    )


def file_name(name: str) -> str:
    """LeRobot's name of our parameter, without the `model.` in front (not of the backbone's)."""
    if name in _PARAMETERS:
        return _PARAMETERS[name]
    module, _, kind = name.rpartition(".")
    if module in _SINGLE:
        return f"{_SINGLE[module]}.{kind}"
    match = re.fullmatch(r"act\.(encoder|decoder)\.(\d+)\.(\w+_norm|own|cross|mlp)\.?(\w*)", module)
    if not match:
        raise KeyError(name)
    side, part, inner = f"{match[1]}.layers.{match[2]}", match[3], match[4]
    if part == "mlp":
        return f"{side}.{_MLP[inner]}.{kind}"
    if part.endswith("_norm"):
        return f"{side}.{(_ENCODER_NORMS if match[1] == 'encoder' else _DECODER_NORMS)[part]}.{kind}"
    # queries, keys and values are one tensor in torch's own attention
    return f"{side}.{_ATTENTION[part]}.{f'out_proj.{kind}' if inner == 'out' else f'in_proj_{kind}'}"


def _shaped(name: str, tensor, like):
    if match := re.search(r"\.(?:own|cross)\.([qkv])\.", name):
        return tensor.chunk(3)["qkv".index(match[1])]
    return tensor.reshape(like.shape) if name == "vision.projection.weight" else tensor


def _plain(weights: Weights) -> Weights:
    """Without the name of the network within the policy."""
    return weights.renamed(lambda name: name.removeprefix("model."))
