"""A checkpoint directory -> a `PolicySpec` and, when asked, the policy with its weights.

The layout is LeRobot's `pretrained_model/`: config.json, model.safetensors, policy_preprocessor.json and
policy_postprocessor.json with their statistics in safetensors. Two things LeRobot leaves outside the directory lie in
ours: the backbone (`vlm_model_name` names a directory beside config.json with the backbone's config.json and
tokenizer.json) and `vla_edge.json` with what a robot must know and LeRobot does not say: joint names, time between
points, whether actions are offsets, and how each camera's frames are cropped. doc/checkpoint.md lists every entry.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.files import sha256
from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json, read_tensors, read_tokenizer
from vla_edge.policy.checkpoint_processors import Processing, read_processing
from vla_edge.policy.spec import ACTION, STATE, CameraSpec, PolicySpec

__all__ = ["Checkpoint", "CheckpointError", "fingerprint", "load_checkpoint", "load_policy"]

ROBOT_FILE = "vla_edge.json"
WEIGHTS_FILE = "model.safetensors"
# what would change a SmolVLA's arithmetic and is not written here: option -> value that leaves it alone
_UNSUPPORTED = {
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "empty_cameras": 0,
    "use_peft": False,
}


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
    config: Document
    backbone: Document
    spec: PolicySpec
    tokenizer_path: Path
    weights_path: Path
    fingerprint: str


def load_checkpoint(directory: str | Path) -> Checkpoint:
    """Read and check everything but the weights.

    Raises:
        CheckpointError: what is missing or wrong, in which file, and what to do.
    """
    directory = Path(directory).expanduser().resolve()
    if not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {directory}; give one in LeRobot's layout")
    config = read_json(directory / "config.json")
    _check_supported(config)
    robot = read_json(directory / ROBOT_FILE)
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        pickled = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
        hint = f"convert {pickled[0]} to safetensors first" if pickled else "copy it from where the policy was trained"
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}; {hint}")
    backbone = directory / str(config["vlm_model_name"])
    if not (backbone / "config.json").is_file():
        raise CheckpointError(
            f"the backbone {config['vlm_model_name']!r} is not a directory inside {directory}; copy the backbone's "
            "config.json and tokenizer.json there and name that directory in vlm_model_name"
        )
    tokenizer = backbone / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{backbone} has no tokenizer.json; copy the backbone's tokenizer there")
    read_tokenizer(tokenizer)
    try:
        spec = _spec(config, robot, read_processing(directory))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory} does not describe a SmolVLA that can be served: {error}; "
            f"compare config.json and {ROBOT_FILE} with doc/checkpoint.md"
        ) from error
    return Checkpoint(
        directory, config, read_json(backbone / "config.json"), spec, tokenizer, weights, fingerprint(directory)
    )


def load_policy(checkpoint: Checkpoint):
    """The policy in float32 on the CPU, in eval mode.

    Raises:
        CheckpointError: the weights are damaged, incomplete, of another shape, or not finite.
    """
    import torch

    from vla_edge.policy.smolvla import SmolVLA
    from vla_edge.policy.smolvla_names import from_lerobot
    from vla_edge.policy.smolvla_shapes import smolvla_config

    path = checkpoint.weights_path
    try:
        policy = SmolVLA(smolvla_config(checkpoint))
    except (AttributeError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{checkpoint.config.path} and {checkpoint.backbone.path} do not give the shapes of a SmolVLA: {error}; "
            "copy both from where the policy was trained"
        ) from error
    tensors = read_tensors(path, "torch")
    # LeRobot runs a backbone that came with weights of its own in bfloat16, and any other in float32
    vision_dtype = torch.bfloat16 if checkpoint.config.get("load_vlm_weights") else torch.float32
    try:
        policy.load_state_dict(from_lerobot(tensors, policy, vision_dtype))
    except KeyError as error:
        raise CheckpointError(
            f"{path} lacks {error}; it is of an older LeRobot layout or of another policy family"
        ) from error
    except (IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit config.json and the backbone's: {str(error).splitlines()[-1].strip()}; "
            "take all three from the same training run"
        ) from error
    broken = [name for name, tensor in policy.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{path} holds values that are not finite, first in {broken[0]}; take an earlier save")
    return policy.float().eval()


def fingerprint(directory: Path) -> str:
    """SHA-256 over the names and contents of all files below `directory`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def _check_supported(config: Document) -> None:
    if config.get("type") != "smolvla":
        raise CheckpointError(f"{config.path} is of type {config.get('type')!r}; this version loads 'smolvla'")
    for option, harmless in _UNSUPPORTED.items():
        if (value := config.get(option, harmless)) != harmless:
            raise CheckpointError(
                f"{config.path} sets {option} to {value!r}, which this version does not do; "
                f"train or convert the policy with {option} = {harmless!r}"
            )


def _spec(config: Document, robot: Document, processing: Processing) -> PolicySpec:
    width, height = config["resize_imgs_with_padding"]
    cameras = tuple(
        _camera(key, feature["shape"], robot["cameras"], height, width)
        for key, feature in config["input_features"].items()
        if feature["type"] == "VISUAL"
    )
    if not cameras:
        raise ValueError("there is no camera among the input features")
    joints, dt = tuple(robot["joint_names"]), float(robot["dt"])
    if len(set(joints)) != len(joints):
        raise ValueError(f"{ROBOT_FILE} names a joint twice")
    if not 0 < dt < np.inf:
        raise ValueError(f"{ROBOT_FILE} says dt = {dt} s")
    for width_of in ("max_state_dim", "max_action_dim"):
        if config.count(width_of) < len(joints):
            raise ValueError(f"{width_of} is {config[width_of]} but {ROBOT_FILE} names {len(joints)} joints")
    for feature, entry in ((STATE, config["input_features"][STATE]), (ACTION, config["output_features"][ACTION])):
        if tuple(entry["shape"]) != (len(joints),):
            raise ValueError(f"{feature} has shape {entry['shape']} but {ROBOT_FILE} names {len(joints)} joints")
    for name, normalization in ((STATE, processing.state), (ACTION, processing.action)):
        if any(np.shape(offset_or_scale) not in ((), (len(joints),)) for offset_or_scale in normalization.affine()):
            raise ValueError(f"the statistics of {name} are not of {len(joints)} joints")
    prefix = robot.count("trained_prefix") if "trained_prefix" in robot else 0
    if prefix >= config.count("chunk_size"):
        raise ValueError(f"{ROBOT_FILE} says trained_prefix = {prefix}, of chunks of {config['chunk_size']} rows")
    return PolicySpec(
        family=config["type"],
        joint_names=joints,
        cameras=cameras,
        chunk_size=config.count("chunk_size"),
        dt=dt,
        num_steps=config.count("num_steps"),
        max_state_dim=config.count("max_state_dim"),
        max_action_dim=config.count("max_action_dim"),
        tokenizer_max_length=config.count("tokenizer_max_length"),
        prompt=processing.prompt,
        relative_actions=bool(robot["relative_actions"]),
        state=processing.state,
        action=processing.action,
        trained_prefix=prefix,
    )


def _camera(key: str, shape: list[int], facts: Document, height: int, width: int) -> CameraSpec:
    name = key.rpartition(".")[2]
    camera = facts[name]
    crop = tuple(camera["crop"])
    source = camera.count("height"), camera.count("width")
    if crop[2:] != tuple(shape[1:]):
        raise ValueError(f"camera {name}: crop {crop} does not give the feature's shape {shape}")
    if min(crop) < 0 or crop[0] + crop[2] > source[0] or crop[1] + crop[3] > source[1]:
        raise ValueError(f"camera {name}: crop {crop} leaves the {source[0]} x {source[1]} frame")
    return CameraSpec(name, key, *source, crop, height, width)
