"""A SmolVLA out of LeRobot's `pretrained_model/`.

The backbone, which LeRobot leaves outside, is what `vlm_model_name` names: a directory beside config.json with the
backbone's config.json and tokenizer.json, or a repository that Hugging Face's cache holds already.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vla_edge.policy.checkpoint_files import CheckpointError, Document, in_hub_cache, read_json, read_tokenizer
from vla_edge.policy.families import Description
from vla_edge.policy.lerobot_layout import check_options, lerobot_spec
from vla_edge.policy.robot_facts import ROBOT_FILE, RobotFacts

if TYPE_CHECKING:
    from vla_edge.policy.checkpoint import Checkpoint
    from vla_edge.policy.smolvla import SmolVLAConfig

# transformers leaves out of a config.json what equals its own defaults
_VISION_DEFAULTS = {"intermediate_size": 3072, "num_hidden_layers": 12, "layer_norm_eps": 1e-6}

_UNSUPPORTED = {"adapt_to_pi_aloha": False, "use_delta_joint_actions_aloha": False, "empty_cameras": 0, "use_peft": False}


def describe(directory: Path, config: Document) -> Description:
    """See `families`."""
    check_options(config, _UNSUPPORTED)
    robot = RobotFacts(directory)
    name = str(config["vlm_model_name"])
    found = [
        path if path.is_file() else in_hub_cache(name, path.name)
        for path in (directory / name / "config.json", directory / name / "tokenizer.json")
    ]
    if found[0] is None:
        raise CheckpointError(
            f"the backbone {name!r} is not a directory inside {directory}, nor in Hugging Face's cache; copy the "
            "backbone's config.json and tokenizer.json there and name that directory in vlm_model_name"
        )
    if found[1] is None:
        raise CheckpointError(f"{found[0].parent} has no tokenizer.json; copy the backbone's tokenizer there")
    backbone, tokenizer = found
    width, height = config["resize_imgs_with_padding"]
    spec = lerobot_spec(directory, config, robot, (height, width), config.count("num_steps"))
    return Description(spec, tokenizer, read_json(backbone))


def build(checkpoint: Checkpoint, weights):
    """See `families`."""
    from vla_edge.policy.smolvla import SmolVLA

    return SmolVLA(smolvla_config(checkpoint))


def tensors(policy, checkpoint: Checkpoint, weights) -> dict:
    """See `families`."""
    import torch

    from vla_edge.policy.smolvla_names import from_lerobot, is_unused, lerobot_names

    weights.check(lerobot_names(policy), is_unused)
    # LeRobot runs a backbone that came with weights of its own in bfloat16, and any other in float32
    return from_lerobot(weights, policy, torch.bfloat16 if checkpoint.config.get("load_vlm_weights") else torch.float32)


def smolvla_config(checkpoint: Checkpoint) -> SmolVLAConfig:
    """Shapes for `SmolVLA` out of both config files.

    Raises:
        CheckpointError: an entry is missing, or the entries contradict each other.
    """
    from vla_edge.policy.smolvla import SmolVLAConfig

    config, backbone, spec = checkpoint.config, checkpoint.backbone, checkpoint.spec
    text, vision = backbone["text_config"], Document(backbone.path, _VISION_DEFAULTS | backbone["vision_config"])
    text_layers = config["num_vlm_layers"] if config["num_vlm_layers"] > 0 else text.count("num_hidden_layers")
    expert_layers = config["num_expert_layers"] if config["num_expert_layers"] > 0 else text_layers
    if text_layers % expert_layers:
        raise CheckpointError(
            f"{config.path} asks for {expert_layers} expert layers beside {text_layers} text layers; one must divide "
            "the other"
        )
    width, heads = text.count("hidden_size"), text.count("num_attention_heads")
    expert_width = int(width * config["expert_width_multiplier"])
    patch, factor = vision.count("patch_size"), backbone.get("scale_factor", 2)
    size = spec.cameras[0].height
    if any((camera.height, camera.width) != (size, size) for camera in spec.cameras) or size % (patch * factor):
        raise CheckpointError(
            f"{config.path} resizes images to {spec.cameras[0].height} x {spec.cameras[0].width} px; this version "
            f"takes squares whose side is a multiple of {patch * factor} px (patch size times scale factor)"
        )
    tokens = read_tokenizer(checkpoint.tokenizer_path)
    if tokens.get_vocab_size() > text.count("vocab_size"):
        raise CheckpointError(
            f"{checkpoint.tokenizer_path} has {tokens.get_vocab_size()} tokens and {backbone.path} "
            f"{text['vocab_size']}; copy the tokenizer the policy was trained with"
        )
    start, end = _image_markers(checkpoint, tokens) if config.get("add_image_special_tokens") else ((), ())
    return SmolVLAConfig(
        cameras=len(spec.cameras),
        image_size=size,
        patch_size=patch,
        scale_factor=factor,
        vision_width=vision.count("hidden_size"),
        vision_hidden=vision.count("intermediate_size"),
        vision_layers=vision.count("num_hidden_layers"),
        vision_heads=vision.count("num_attention_heads"),
        vision_eps=vision["layer_norm_eps"],
        vocabulary=text.count("vocab_size"),
        text_width=width,
        text_hidden=text.count("intermediate_size"),
        text_layers=text_layers,
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or width // heads,
        text_eps=text.get("rms_norm_eps", 1e-6),
        expert_width=expert_width,
        expert_hidden=_expert_hidden(checkpoint, expert_width),
        expert_every=text_layers // expert_layers,
        self_attention_every=config["self_attn_every_n_layers"],
        cross_attention="cross" in config["attention_mode"],
        chunk_size=spec.chunk_size,
        max_state_dim=spec.max_state_dim,
        max_action_dim=spec.max_action_dim,
        language_length=spec.tokenizer_max_length,
        min_period=config["min_period"],
        max_period=config["max_period"],
        image_start_ids=start,
        image_end_ids=end,
        trained_prefix=spec.trained_prefix,
    )


def expert_hidden(width: int) -> int:
    """Feed-forward width SmolVLA gives an expert: two thirds of four times its width, rounded up to 256."""
    return -(-int(2 * width / 3) * 4 // 256) * 256


def _expert_hidden(checkpoint: Checkpoint, width: int) -> int:
    """What SmolVLA gives an expert, or the part of it that a student uses; the rest of its tensors is zero."""
    robot, given = read_json(checkpoint.directory / ROBOT_FILE), expert_hidden(width)
    if "expert_hidden" not in robot:
        return given
    if (used := robot.count("expert_hidden")) > given:
        raise CheckpointError(f"{robot.path} says expert_hidden = {used}, and an expert {width} wide has {given}")
    return used


def _image_markers(checkpoint: Checkpoint, tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids = [tokenizer.token_to_id(token) for token in ("<fake_token_around_image>", "<global-img>")]
    if None in ids:
        raise CheckpointError(
            f"{checkpoint.config.path} asks for image special tokens, which {checkpoint.tokenizer_path} does not have; "
            "copy the tokenizer the policy was trained with"
        )
    return tuple(ids), (ids[0],)
