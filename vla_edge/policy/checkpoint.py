"""A checkpoint directory -> a `PolicySpec` and, when asked, the policy with its weights.

The layout is LeRobot's `pretrained_model/`: config.json, model.safetensors, policy_preprocessor.json and
policy_postprocessor.json with their statistics in safetensors. Two things LeRobot leaves outside the directory lie in
ours: the backbone (`vlm_model_name` names a directory beside config.json with the backbone's config.json and
tokenizer.json) and `vla_edge.json` with what a robot must know and LeRobot does not say: joint names, time between
points, whether actions are offsets, and how each camera's frames are cropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.policy.spec import ACTION, STATE, CameraSpec, Normalization, NormalizationMode, PolicySpec
from vla_edge.types import VlaEdgeError

ROBOT_FILE = "vla_edge.json"
WEIGHTS_FILE = "model.safetensors"


class CheckpointError(VlaEdgeError):
    """A checkpoint that is missing, damaged or incomplete."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose small files have been read and agree with each other.

    Attributes:
        directory: absolute.
        config: LeRobot's config.json. backbone: the backbone's config.json.
        spec: what serving needs.
        fingerprint: SHA-256 over every file's relative name and content, hexadecimal.
    """

    directory: Path
    config: Mapping
    backbone: Mapping
    spec: PolicySpec
    tokenizer_path: Path
    weights_path: Path
    fingerprint: str


def load_checkpoint(directory: str | Path) -> Checkpoint:
    """Read and check everything but the weights' values.

    Raises:
        CheckpointError: what is missing or wrong, in which file, and what to do.
    """
    directory = Path(directory).expanduser().resolve()
    if not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {directory}; give one in LeRobot's layout")
    config = _read_json(directory, "config.json")
    if config.get("type") != "smolvla":
        raise CheckpointError(
            f"{directory / 'config.json'} is of type {config.get('type')!r}; this version loads 'smolvla'"
        )
    robot = _read_json(directory, ROBOT_FILE)
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        pickled = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
        hint = f"convert {pickled[0]} to safetensors first" if pickled else "copy it from where the policy was trained"
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}; {hint}")
    backbone_directory = directory / str(config.get("vlm_model_name", ""))
    if not (backbone_directory / "config.json").is_file():
        raise CheckpointError(
            f"the backbone {config.get('vlm_model_name')!r} is not a directory inside {directory}; copy the backbone's "
            "config.json and tokenizer.json there and name that directory in vlm_model_name"
        )
    tokenizer = backbone_directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{backbone_directory} has no tokenizer.json; copy the backbone's tokenizer there")
    try:
        spec = _spec(directory, config, robot)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory} does not describe a SmolVLA that can be served: {type(error).__name__} {error}; "
            f"compare config.json and {ROBOT_FILE} with doc/checkpoint.md"
        ) from error
    return Checkpoint(
        directory,
        config,
        _read_json(backbone_directory, "config.json"),
        spec,
        tokenizer,
        weights,
        fingerprint(directory),
    )


def load_policy(checkpoint: Checkpoint):
    """The policy in float32 on the CPU, in eval mode.

    Raises:
        CheckpointError: the weights are damaged, incomplete, of another shape, or not finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from vla_edge.policy.smolvla import SmolVLA
    from vla_edge.policy.smolvla_names import from_lerobot

    path = checkpoint.weights_path
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error
    try:
        policy = SmolVLA(smolvla_config(checkpoint))
        policy.load_state_dict(from_lerobot(tensors, policy))
    except KeyError as error:
        raise CheckpointError(
            f"{path} lacks {error}; it is of an older LeRobot layout or of another policy family"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit config.json and the backbone: {str(error).splitlines()[-1].strip()}"
        ) from error
    broken = [name for name, tensor in policy.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{path} holds values that are not finite, first in {broken[0]}; take an earlier save")
    return policy.float().eval()


def smolvla_config(checkpoint: Checkpoint):
    """Shapes for `SmolVLA` out of both config files."""
    from vla_edge.policy.smolvla import SmolVLAConfig

    config, text = checkpoint.config, checkpoint.backbone["text_config"]
    vision, spec = checkpoint.backbone["vision_config"], checkpoint.spec
    text_layers = config["num_vlm_layers"] if config["num_vlm_layers"] > 0 else text["num_hidden_layers"]
    expert_layers = config["num_expert_layers"] if config["num_expert_layers"] > 0 else text_layers
    if text_layers % expert_layers:
        raise CheckpointError(
            f"config.json asks for {expert_layers} expert layers beside {text_layers} text layers; one must divide "
            "the other"
        )
    expert_width = int(text["hidden_size"] * config["expert_width_multiplier"])
    sizes = {(camera.height, camera.width) for camera in spec.cameras}
    if sizes != {(vision["image_size"],) * 2}:
        raise CheckpointError(f"the backbone takes {vision['image_size']} px squares, but the cameras give {sizes}")
    start, end = _image_markers(checkpoint) if config.get("add_image_special_tokens") else ((), ())
    return SmolVLAConfig(
        cameras=len(spec.cameras),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        scale_factor=checkpoint.backbone["scale_factor"],
        vision_width=vision["hidden_size"],
        vision_hidden=vision["intermediate_size"],
        vision_layers=vision["num_hidden_layers"],
        vision_heads=vision["num_attention_heads"],
        vision_eps=vision.get("layer_norm_eps", 1e-6),
        vocabulary=text["vocab_size"],
        text_width=text["hidden_size"],
        text_hidden=text["intermediate_size"],
        text_layers=text_layers,
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        text_eps=text.get("rms_norm_eps", 1e-5),
        expert_width=expert_width,
        expert_hidden=expert_hidden(expert_width),
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
    )


def expert_hidden(width: int) -> int:
    """Feed-forward width SmolVLA gives an expert: two thirds of four times its width, rounded up to 256."""
    return -(-int(2 * width / 3) * 4 // 256) * 256


def fingerprint(directory: Path) -> str:
    """SHA-256 over the names and contents of all files below `directory`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _spec(directory: Path, config: Mapping, robot: Mapping) -> PolicySpec:
    statistics = _statistics(directory)
    modes = config["normalization_mapping"]
    width, height = config["resize_imgs_with_padding"]
    cameras = []
    for key, feature in config["input_features"].items():
        if feature["type"] != "VISUAL":
            continue
        name = key.rpartition(".")[2]
        camera = robot["cameras"][name]
        crop = tuple(camera["crop"])
        if crop[2:] != tuple(feature["shape"][1:]):
            raise ValueError(f"camera {name}: crop {crop} does not give the feature's shape {feature['shape']}")
        if min(crop) < 0 or crop[0] + crop[2] > camera["height"] or crop[1] + crop[3] > camera["width"]:
            raise ValueError(f"camera {name}: crop {crop} leaves the {camera['height']} x {camera['width']} frame")
        cameras.append(CameraSpec(name, key, camera["height"], camera["width"], crop, height, width))
    joints = tuple(robot["joint_names"])
    for feature, shape in ((STATE, config["input_features"][STATE]), (ACTION, config["output_features"][ACTION])):
        if tuple(shape["shape"]) != (len(joints),):
            raise ValueError(f"{feature} has shape {shape['shape']} but {ROBOT_FILE} names {len(joints)} joints")
    return PolicySpec(
        family=config["type"],
        joint_names=joints,
        cameras=tuple(cameras),
        chunk_size=config["chunk_size"],
        dt=float(robot["dt"]),
        num_steps=config["num_steps"],
        max_state_dim=config["max_state_dim"],
        max_action_dim=config["max_action_dim"],
        tokenizer_max_length=config["tokenizer_max_length"],
        prompt="{instruction}\n",
        relative_actions=bool(robot["relative_actions"]),
        state=_normalization(modes["STATE"], statistics, STATE),
        action=_normalization(modes["ACTION"], statistics, ACTION),
    )


def _normalization(mode: str, statistics: Mapping[str, np.ndarray], feature: str) -> Normalization:
    prefix = f"{feature}."
    return Normalization(
        NormalizationMode(mode),
        {
            key[len(prefix) :]: tuple(map(float, values))
            for key, values in statistics.items()
            if key.startswith(prefix) and values.ndim == 1 and not key.endswith("count")
        },
    )


def _statistics(directory: Path) -> dict[str, np.ndarray]:
    """Statistics of the normalizing steps of the pre- and post-processor, feature.statistic -> (D,)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    statistics: dict[str, np.ndarray] = {}
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        for step in _read_json(directory, name)["steps"]:
            if "state_file" in step:
                try:
                    statistics.update(load_file(directory / step["state_file"]))
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(
                        f"{directory / step['state_file']} cannot be read ({error}); the policy cannot be normalized "
                        "without its statistics: copy the file from where the policy was trained"
                    ) from error
    return statistics


def _image_markers(checkpoint: Checkpoint) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    ids = [tokenizer.token_to_id(token) for token in ("<fake_token_around_image>", "<global-img>")]
    if None in ids:
        raise CheckpointError(
            f"config.json asks for image special tokens, which {checkpoint.tokenizer_path} does not have"
        )
    return tuple(ids), (ids[0],)


def _read_json(directory: Path, name: str) -> dict:
    try:
        content = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {name}; copy it from where the policy was trained") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory / name} cannot be read ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{directory / name} does not hold a JSON object")
    return content
