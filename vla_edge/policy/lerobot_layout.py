"""LeRobot's `pretrained_model/`: config.json and the two processors -> a `PolicySpec`, the same for all families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vla_edge.policy.checkpoint_files import CheckpointError, Document
from vla_edge.policy.checkpoint_processors import PREPROCESSOR, read_processing
from vla_edge.policy.robot_facts import ROBOT_FILE, RobotFacts
from vla_edge.policy.spec import ACTION, STATE, PolicySpec
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
    """What serving needs.

    Args:
        size: (height, width) of the network's images. fit: of `CameraSpec`.

    Raises:
        CheckpointError, TypeError, ValueError: what is missing or contradicts another file.
    """
    if not (directory / f"{PREPROCESSOR}.json").is_file() and any(map(is_statistic, Weights(find_weights(directory)))):
        raise CheckpointError(f"{directory} has no {PREPROCESSOR}.json, but its weights hold statistics; {MIGRATE}")
    processing = read_processing(directory)
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
    for feature, entry in ((STATE, config["input_features"][STATE]), (ACTION, config["output_features"][ACTION])):
        if tuple(entry["shape"]) != (len(joints),):
            raise ValueError(f"{feature} has shape {entry['shape']} but {ROBOT_FILE} names {len(joints)} joints")
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
