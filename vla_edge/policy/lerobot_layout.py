"""LeRobot's `pretrained_model/`: config.json and the two processors -> a `PolicySpec`, the same for all families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vla_edge.policy.checkpoint_files import CheckpointError, Document
from vla_edge.policy.checkpoint_processors import PREPROCESSOR, Processing, read_processing
from vla_edge.policy.robot_facts import ROBOT_FILE, RobotFacts
from vla_edge.policy.spec import ACTION, STATE, CameraSpec, PolicySpec
from vla_edge.policy.weights import MIGRATE, Weights, find_weights, is_statistic

EMPTY_CAMERA = "observation.images.empty_camera_"


def check_options(config: Document, harmless: Mapping[str, object]) -> None:
    """Nothing, when no option is set that would change the arithmetic and is not written here.

    Args:
        harmless: option -> the value that leaves it alone.

    Raises:
        CheckpointError: which one is set.
    """
    for option, value in harmless.items():
        if (found := config.get(option, value)) != value:
            raise CheckpointError(
                f"{config.path} sets {option} to {found!r}, which this version does not do; "
                f"train or convert the policy with {option} = {value!r}"
            )


def lerobot_spec(directory: Path, config: Document, robot: RobotFacts, size, num_steps: int, **fit) -> PolicySpec:
    """What serving a policy needs that reads an instruction.

    Args:
        size: (height, width) of the network's images. fit: of `CameraSpec`.

    Raises:
        CheckpointError, TypeError, ValueError: what is missing or contradicts another file.
    """
    processing = _processing(directory)
    height, width = size
    # an empty camera is one that attention never sees
    cameras = tuple(
        robot.camera(key.rpartition(".")[2], key, (height, width), feature["shape"][1:], **fit)
        for key, feature in config["input_features"].items()
        if feature["type"] == "VISUAL" and not key.startswith(EMPTY_CAMERA)
    )
    if not cameras:
        raise ValueError("there is no camera among the input features")
    joints = robot.joint_names
    for width_of in ("max_state_dim", "max_action_dim"):
        if config.count(width_of) < len(joints):
            raise ValueError(f"{width_of} is {config[width_of]} but {ROBOT_FILE} names {len(joints)} joints")
    _check_joints(config, robot)
    if robot.trained_prefix >= config.count("chunk_size"):
        raise ValueError(
            f"{ROBOT_FILE} says trained_prefix = {robot.trained_prefix}, of chunks of {config['chunk_size']} rows"
        )
    robot.check_statistics(**{STATE: processing.state, ACTION: processing.action})
    return PolicySpec(
        family=config["type"],
        joint_names=joints,
        cameras=cameras,
        chunk_size=config.count("chunk_size"),
        dt=robot.dt,
        num_steps=num_steps,
        max_state_dim=config.count("max_state_dim"),
        max_action_dim=config.count("max_action_dim"),
        tokenizer_max_length=config.count("tokenizer_max_length"),
        prompt=processing.prompt,
        relative_actions=robot.relative_actions,
        state=processing.state,
        action=processing.action,
        text=processing.text,
        trained_prefix=robot.trained_prefix,
    )


def wordless_spec(
    directory: Path, config: Document, robot: RobotFacts, num_steps: int, chunk_size: int, crop=None, **more
) -> PolicySpec:
    """What serving a policy needs that reads pictures at their own size, and no instruction.

    Args:
        crop: (height, width) taken out of the middle of each picture; all of it when None.
        more: entries of `PolicySpec`.

    Raises:
        CheckpointError, TypeError, ValueError: what is missing or contradicts another file.
    """
    features = config["input_features"]
    keys = [key for key, feature in features.items() if feature["type"] == "VISUAL"]
    if not keys:
        raise ValueError("there is no camera among the input features")
    if unknown := sorted(set(features) - {*keys, STATE}):
        raise CheckpointError(f"{config.path} has the input {unknown[0]}, which no robot can give; train without it")
    if len(sizes := {tuple(features[key]["shape"][1:]) for key in keys}) > 1:
        raise ValueError(f"cameras are of the sizes {sorted(sizes)}; this version takes cameras of one size")
    if robot.trained_prefix:
        raise ValueError(f"{ROBOT_FILE} says trained_prefix = {robot.trained_prefix}, of a policy that continues nothing")
    _check_joints(config, robot)
    processing = _processing(directory, keys)
    robot.check_statistics(**{STATE: processing.state, ACTION: processing.action})
    cameras = []
    for key in keys:
        shape = features[key]["shape"][1:]
        camera = robot.camera(key.rpartition(".")[2], key, tuple(shape), shape)
        offset, scale = (np.broadcast_to(part, 3).tolist() for part in processing.images[key].affine())
        camera = replace(camera, offset=tuple(offset), scale=tuple(scale))
        cameras.append(camera if crop is None else _middle(camera, *crop))
    return PolicySpec(
        family=config["type"],
        joint_names=robot.joint_names,
        cameras=tuple(cameras),
        chunk_size=chunk_size,
        dt=robot.dt,
        num_steps=num_steps,
        max_state_dim=len(robot.joint_names),
        max_action_dim=len(robot.joint_names),
        tokenizer_max_length=0,
        prompt="",
        relative_actions=robot.relative_actions,
        state=processing.state,
        action=processing.action,
        **more,
    )


def backbone_blocks(config: Document) -> tuple[int, ...]:
    """Of each stage of the ResNet that a policy sees with.

    Raises:
        CheckpointError: it is none that this version has.
    """
    from vla_edge.policy.resnet import STAGES

    name = config["vision_backbone"]
    if name not in STAGES:
        raise CheckpointError(f"{config.path} names the vision backbone {name!r}; this version loads {', '.join(STAGES)}")
    return STAGES[name]


def _middle(camera: CameraSpec, height: int, width: int) -> CameraSpec:
    """Of a camera the middle of its crop, as torchvision's CenterCrop rounds it."""
    top, left, whole_height, whole_width = camera.crop
    if height > whole_height or width > whole_width:
        raise ValueError(f"camera {camera.name}: {height} x {width} px cannot be cropped out of {camera.crop}")
    crop = top + round((whole_height - height) / 2), left + round((whole_width - width) / 2), height, width
    return replace(camera, crop=crop, height=height, width=width)


def _processing(directory: Path, images: Sequence[str] = ()) -> Processing:
    if not (directory / f"{PREPROCESSOR}.json").is_file() and any(map(is_statistic, Weights(find_weights(directory)))):
        raise CheckpointError(f"{directory} has no {PREPROCESSOR}.json, but its weights hold statistics; {MIGRATE}")
    return read_processing(directory, images)


def _check_joints(config: Document, robot: RobotFacts) -> None:
    joints = len(robot.joint_names)
    for feature, entry in ((STATE, config["input_features"][STATE]), (ACTION, config["output_features"][ACTION])):
        if tuple(entry["shape"]) != (joints,):
            raise ValueError(f"{feature} has shape {entry['shape']} but {ROBOT_FILE} names {joints} joints")
