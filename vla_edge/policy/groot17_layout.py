"""What a GR00T N1.7 directory says besides its weights -> a `PolicySpec`, for both layouts.

Isaac-GR00T leaves a Hugging Face directory, whose processor_config.json says which keys of state and actions an embodiment
has and what becomes of pictures, with statistics by embodiment and key in statistics.json. LeRobot leaves a
`pretrained_model/`, whose processors say the same. Tokenizer, chat template and the sizes of Qwen3-VL lie in neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json, read_tokenizer
from vla_edge.policy.checkpoint_processors import MOVING, POSTPROCESSOR, PREPROCESSOR
from vla_edge.policy.groot17_pictures import fit_of
from vla_edge.policy.groot_layout import (
    EMBODIMENT_IDS,
    INSTRUCTION_TOKENS,
    as_prompt,
    filled_template,
    find_backbone,
    head_config,
    is_lerobot,
    needed_steps,
    number_of,
    saved_bounds,
    tag_of,
    tokenizer_path,
)
from vla_edge.policy.lerobot_layout import check_options
from vla_edge.policy.robot_facts import ROBOT_FILE, RobotFacts
from vla_edge.policy.spec import ACTION, STATE, CameraSpec, Normalization, NormalizationMode, PolicySpec, TextSpec

PROCESSOR, STATISTICS, PICTURES = "processor_config.json", "statistics.json", "preprocessor_config.json"
BACKBONE_REPOSITORY = "nvidia/Cosmos-Reason2-2B"
# which of the networks for state and actions an embodiment has in the published weights (processing_gr00t_n1d7.py)
EMBODIMENTS = {
    "simpler_env_google": 0, "simpler_env_widowx": 1, "libero_sim": 2, "new_embodiment": 10, "robocasa_panda_omron": 10,
    "robocasa_gr1_tabletop": 10, "unitree_g1_sonic": 11, "oxe_droid_relative_eef_relative_joint": 24,
    "real_g1_relative_eef_relative_joints": 25, "unitree_g1_full_body_with_waist_height_nav_cmd": 25,
    "real_r1_pro_sharpa_relative_eef": 26, "xdof_relative_eef_relative_joint": 27,
}  # fmt: skip
IMAGE = "<|image_pad|>"
PACK, ENCODE = "groot_n1_7_pack_inputs_v1", "groot_n1_7_vlm_encode_v1"
DECODE, UNPACK = "groot_n1_7_action_decode_v1", "groot_action_unpack_unnormalize_v2"
_KNOWN = {PREPROCESSOR: MOVING | {PACK, ENCODE}, POSTPROCESSOR: MOVING | {DECODE, UNPACK}}
# of what Isaac-GR00T's processor can do, what is not done here
_PROCESSOR_OPTIONS = {
    "apply_sincos_state_encoding": False, "exclude_state": False, "use_mean_std": False, "use_tactile": False,
}  # fmt: skip
_MODALITY_OPTIONS = {"sin_cos_embedding_keys": None, "mean_std_embedding_keys": None}


@dataclass(frozen=True)
class Processing17:
    """What goes before and after the networks.

    Attributes:
        references: (D,) for each dimension of an action, that of the state which it is told from; -1 where it is absolute.
        points: of a chunk. cameras: names in the policy's order; any, in the alphabet's, when empty.
        pictures: what becomes of them. formal: instructions are brought to small letters, digits and spaces.
        embodiment: number of its networks.
    """

    state: Normalization
    action: Normalization
    references: tuple[int, ...]
    points: int
    cameras: tuple[str, ...]
    pictures: Document
    formal: bool
    embodiment: int

    @property
    def is_relative(self) -> bool:
        """Whether an action is told from what is measured."""
        return max(self.references, default=-1) >= 0


def groot17_spec(directory: Path, config: Document, backbone: Path) -> PolicySpec:
    """What serving the policy needs.

    Args:
        backbone: as `backbone17_directory` finds it.

    Raises:
        CheckpointError, TypeError, ValueError: what is missing or contradicts another file.
    """
    robot, head = RobotFacts(directory), head_config(directory, config)
    if robot.trained_prefix:
        raise ValueError(f"{ROBOT_FILE} says trained_prefix = {robot.trained_prefix}, of a policy that continues nothing")
    check_options(head, {"state_history_length": 1})
    rows = head.count("action_horizon")
    processing = read_processing17(directory, config, robot)
    steps, points = head.count("num_inference_timesteps"), min(rows, processing.points)
    if is_lerobot(config):
        check_options(config, {"n_obs_steps": 1, "use_peft": False, "action_decode_transform": None})
        steps = config.get("num_inference_timesteps") or steps
        points = min(points, config.count("chunk_size"))
    _check_widths(robot, head, processing)
    cameras = _cameras(config, robot, processing, backbone)
    prompt = _prompt(backbone, len(cameras))
    empty = read_tokenizer(tokenizer_path(backbone)).encode(prompt.format(instruction="")).ids
    return PolicySpec(
        family="groot17",
        joint_names=robot.joint_names,
        cameras=cameras,
        chunk_size=points,
        dt=robot.dt,
        num_steps=steps,
        max_state_dim=head.count("max_state_dim"),
        max_action_dim=head.count("max_action_dim"),
        tokenizer_max_length=len(empty) + INSTRUCTION_TOKENS,
        prompt=prompt,
        relative_actions=processing.is_relative or robot.relative_actions,
        absolute_names=_absolute(robot, processing),
        state=processing.state,
        action=_of_points(processing.action, points),
        text=TextSpec(lower=processing.formal, bare=processing.formal),
        state_names=robot.state_names if robot.state_names != robot.joint_names else (),
    )


def read_processing17(directory: Path, config: Document, robot: RobotFacts) -> Processing17:
    """Out of LeRobot's processors or Isaac-GR00T's configuration of its own.

    Raises:
        CheckpointError: a file, an entry or a statistic is missing, or asks for what is not done here.
    """
    if is_lerobot(config):
        return _of_lerobot(directory, robot)
    settings = read_json(directory / PROCESSOR)["processor_kwargs"]
    check_options(settings, _PROCESSOR_OPTIONS)
    modalities = settings["modality_configs"]
    known, path = read_json(directory / STATISTICS), directory / EMBODIMENT_IDS
    tag = tag_of(robot, known)
    raw, modality = known[tag], modalities[tag]
    numbers = EMBODIMENTS | (read_json(path) if path.is_file() else settings.get("embodiment_id_mapping") or {})
    if len(modality["video"]["delta_indices"]) != 1 or len(modality["state"]["delta_indices"]) != 1:
        raise CheckpointError(f"{settings.path} reads more than one moment of {tag}; this version takes the newest alone")
    percentiles = bool(settings.get("use_percentiles", False))
    state = [_bounds(raw["state"][key], percentiles) for key in modality["state"]["modality_keys"]]
    return Processing17(
        state=_min_max(_joined(state), clip=bool(settings.get("clip_outliers", True))),
        **_actions(raw, modality, percentiles, bool(settings.get("use_relative_action", False))),
        cameras=tuple(modality["video"]["modality_keys"]),
        pictures=settings,
        formal=bool(settings.get("formalize_language", True)),
        embodiment=number_of(tag, numbers, path),
    )


def _of_lerobot(directory: Path, robot: RobotFacts) -> Processing17:
    before = needed_steps(directory, PREPROCESSOR, _KNOWN[PREPROCESSOR], (PACK, ENCODE))
    after = needed_steps(directory, POSTPROCESSOR, _KNOWN[POSTPROCESSOR], ())
    step, pictures, path = before[PACK]["config"], before[ENCODE]["config"], directory / f"{POSTPROCESSOR}.json"
    check_options(step, {"normalize_min_max": True, "state_horizon": 1})
    if (step.get("video_horizon") or 1) != 1:
        raise CheckpointError(f"{step.path} reads {step['video_horizon']} frames; this version takes the newest alone")
    state = np.array(saved_bounds(directory, before[PACK], STATE), np.float64)
    if DECODE in after:
        decode = after[DECODE]["config"]
        check_options(decode, {"action_decode_transform": None})
        raw, modality = decode["raw_stats"], decode["modality_config"]
        actions = _actions(raw, modality, bool(decode["use_percentiles"]), bool(decode["use_relative_action"]))
    elif UNPACK in after:
        check_options(
            after[UNPACK]["config"],
            {"normalize_min_max": True, "clip_normalized_action": True, "libero_gripper_action": False},
        )
        bounds = np.array(saved_bounds(directory, after[UNPACK], ACTION), np.float64)
        points, absolute = int(step["valid_action_horizon"]), (-1,) * bounds.shape[-1]
        actions = dict(action=_min_max(bounds, held=True), references=absolute, points=points)
    else:
        raise CheckpointError(f"{path} has neither {DECODE} nor {UNPACK}, so no action has a scale; copy it again")
    tag = robot.entries.get("embodiment_tag") or step["embodiment_tag"]
    return Processing17(
        state=_min_max(state, clip=bool(step["clip_outliers"])),
        **actions,
        cameras=tuple(step.get("video_modality_keys") or ()),
        pictures=pictures,
        formal=bool(step["formalize_language"]),
        embodiment=int(step["embodiment_mapping"].get(tag, 0)),  # as LeRobot
    )


def backbone17_directory(directory: Path, config: Document) -> Path:
    """Where config.json, preprocessor_config.json, tokenizer and chat template of Qwen3-VL are.

    Raises:
        CheckpointError: nowhere.
    """
    name = str(head_config(directory, config).get("model_name") or BACKBONE_REPOSITORY)
    return find_backbone(directory, name, (), "Hugging Face's cache", f"{name}, and its {PICTURES},")


def _actions(raw: Document, modality: Document, percentiles: bool, offsets_used: bool) -> dict:
    """Of `Processing17`, what the keys of an action say.

    Raises:
        CheckpointError: one is no joint position, or its statistics are missing.
    """
    about = modality["action"]
    for kind in ("state", "action"):
        check_options(Document(modality.path, {k: v or None for k, v in modality[kind].items()}), _MODALITY_OPTIONS)
    begins, width = {}, 0
    for key in modality["state"]["modality_keys"]:
        begins[key] = width
        width += _bounds(raw["state"][key], percentiles).shape[-1]
    found, references = [], []
    for key, entry in zip(about["modality_keys"], about.get("action_configs") or [{}] * len(about["modality_keys"])):
        kind, rep = str(entry.get("type", "non_eef")).lower(), str(entry.get("rep", "absolute")).lower()
        if kind != "non_eef" or rep not in ("absolute", "relative"):
            raise CheckpointError(
                f"{modality.path} says that action.{key} is {kind}, {rep}; this version takes joint positions, absolute or "
                "relative to the measured ones"
            )
        relative = offsets_used and rep == "relative"
        bounds = _bounds(raw["relative_action"][key], False) if relative else _bounds(raw["action"][key], percentiles)
        measured = entry.get("state_key") or key
        if relative and measured not in begins:
            raise CheckpointError(f"{modality.path} tells action.{key} from state.{measured} on, which is not read; add it")
        found.append(bounds)
        references += [begins[measured] + i if relative else -1 for i in range(bounds.shape[-1])]
    return dict(
        action=_min_max(_joined(found), held=True), references=tuple(references), points=len(about["delta_indices"]),
    )  # fmt: skip


def _bounds(entry: Document, percentiles: bool) -> np.ndarray:
    """(2, D) or (2, T, D): smallest and largest values of a key."""
    return np.array([entry[side] for side in (("q01", "q99") if percentiles else ("min", "max"))], np.float64)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """(2, D) or (2, T, D) of all keys; what is the same at each point, beside what is not, T times.

    Raises:
        ValueError: some are of more points than others.
    """
    points = {part.shape[1] for part in parts if part.ndim == 3}
    if len(points) > 1:
        raise ValueError(f"statistics are of {sorted(points)} points of a chunk")
    for number in points:
        size = (2, number)
        parts = [part if part.ndim == 3 else np.broadcast_to(part[:, None], (*size, part.shape[-1])) for part in parts]
    return np.concatenate(parts, axis=-1)


def _min_max(bounds: np.ndarray, **flags) -> Normalization:
    if not np.isfinite(bounds).all():
        raise ValueError("of a state or an action a smallest or largest value is not finite")

    def plain(values: np.ndarray) -> tuple:
        return tuple(map(plain, values)) if values.ndim > 1 else tuple(values.tolist())

    statistics = {side: plain(values) for side, values in zip(("min", "max"), bounds)}
    return Normalization(NormalizationMode.MIN_MAX, statistics, fixed=True, **flags)


def _of_points(action: Normalization, points: int) -> Normalization:
    """Of the first `points` of a chunk.

    Raises:
        ValueError: it knows fewer.
    """
    bounds = np.array([action.statistics[side] for side in ("min", "max")])
    if bounds.ndim == 2:
        return action
    if bounds.shape[1] < points:
        raise ValueError(f"statistics are of {bounds.shape[1]} points and a chunk has {points}")
    return _min_max(bounds[:, :points], held=True)


def _check_widths(robot: RobotFacts, head: Document, processing: Processing17) -> None:
    """Raises ValueError: joints, statistics and networks do not fit."""
    robot.check_statistics(**{ACTION: processing.action})
    if any(np.shape(part) != (len(robot.state_names),) for part in processing.state.affine()):
        raise ValueError(f"the statistics of {STATE} are not of the {len(robot.state_names)} joints that are read")
    for width, names in (("max_state_dim", robot.state_names), ("max_action_dim", robot.joint_names)):
        if head.count(width) < len(names):
            raise ValueError(f"{width} is {head[width]} but {ROBOT_FILE} names {len(names)} joints")


def _absolute(robot: RobotFacts, processing: Processing17) -> tuple[str, ...]:
    """Joints that are told as they are, where others are told from the measured positions on.

    Raises:
        ValueError: a joint is told from another's position on, or vla_edge.json says that offsets come out of it.
    """
    if not processing.is_relative:
        return ()
    if robot.relative_actions:
        raise ValueError(f"{ROBOT_FILE} says relative_actions, of a policy whose own processing adds what is measured")
    for name, place in zip(robot.joint_names, processing.references):
        if place >= 0 and robot.state_names[place] != name:
            raise ValueError(f"actions of {name} are offsets to {robot.state_names[place]}; name the same joint in both")
    return tuple(name for name, place in zip(robot.joint_names, processing.references) if place < 0)


def _cameras(config: Document, robot: RobotFacts, processing: Processing17, backbone: Path) -> tuple[CameraSpec, ...]:
    """In the order the policy takes them."""
    wanted = processing.cameras
    if is_lerobot(config):
        features = config["input_features"]
        keys = sorted(key for key, feature in features.items() if feature["type"] == "VISUAL")
        named = {key.rpartition(".")[2]: key for key in keys}
        if wanted and not set(wanted) <= named.keys():
            raise CheckpointError(
                f"{config.path} has the cameras {', '.join(named)}, and the policy looks at {', '.join(wanted)}; name them so"
            )
        places = [(name, named[name], features[named[name]]["shape"][1:]) for name in wanted or named]
    else:
        if missing := [name for name in wanted if name not in robot.cameras]:
            raise CheckpointError(f"{ROBOT_FILE} has no camera {missing[0]!r}, at which the policy looks; describe it there")
        places = [(name, name, None) for name in wanted]
    if not places:
        raise ValueError("there is no camera")
    found = []
    for name, key, shape in places:
        crop = tuple(robot.cameras[name]["crop"])[2:]
        size, fit = fit_of(processing.pictures, read_json(backbone / PICTURES), crop)
        found.append(robot.camera(name, key, size, shape, **fit))
    if len(sizes := {(camera.height, camera.width) for camera in found}) > 1:
        raise ValueError(f"pictures of cameras become {sorted(sizes)} px; this version takes those of one size")
    return tuple(found)


def _prompt(backbone: Path, cameras: int) -> str:
    """The chat template filled with pictures, each one token here, and the place of an instruction."""
    path, text = filled_template(backbone, cameras, answers=False)
    if text.count(IMAGE) != cameras:
        raise CheckpointError(f"{path} has no place for {cameras} pictures; copy the template of the policy's backbone")
    return as_prompt(path, text, IMAGE)
