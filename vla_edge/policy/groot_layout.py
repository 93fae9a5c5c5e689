"""What a GR00T N1.5 directory says besides its weights -> a `PolicySpec`, for both layouts.

Isaac-GR00T leaves a Hugging Face directory, with statistics by embodiment and key in experiment_cfg/metadata.json; which
keys a policy reads, and in what order, its data configuration says, which is code, and vla_edge.json therefore has to.
LeRobot leaves a `pretrained_model/`, whose config.json names the base model and with it the sizes of the action head.
Tokenizer, chat template and the backbone's sizes lie in neither.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from vla_edge.policy.checkpoint_files import (
    CheckpointError,
    Document,
    in_hub_cache,
    read_json,
    read_tensors,
    read_tokenizer,
)
from vla_edge.policy.checkpoint_processors import MOVING, POSTPROCESSOR, PREPROCESSOR, read_steps
from vla_edge.policy.lerobot_layout import check_options
from vla_edge.policy.robot_facts import ROBOT_FILE, RobotFacts
from vla_edge.policy.spec import ACTION, STATE, Normalization, NormalizationMode, PolicySpec, TextSpec

METADATA, EMBODIMENT_IDS = Path("experiment_cfg/metadata.json"), "embodiment_id.json"
BACKBONE, ASSETS = "backbone", "lerobot/eagle2hg-processor-groot-n1p5"
# which of the networks for state and actions an embodiment has in the published weights (gr00t/data/embodiment_tags.py)
EMBODIMENTS = {
    "new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24, "so100": 2, "unitree_g1": 3,
}  # fmt: skip
IMAGE, BEGIN, END = "<IMG_CONTEXT>", "<img>", "</img>"
INSTRUCTION_TOKENS = 48
"""That an instruction may have besides the prompt's own; the original has no limit, and one a language model may read."""
PACK, UNPACK = "groot_pack_inputs_v3", "groot_action_unpack_unnormalize_v1"
_KNOWN = {
    PREPROCESSOR: MOVING | {PACK, "groot_eagle_encode_v3", "groot_eagle_collate_v3"},
    POSTPROCESSOR: MOVING | {UNPACK},
}
_INSTRUCTION = "the instruction"  # stands for it while the chat template is filled


def groot_spec(directory: Path, config: Document, backbone: Path) -> PolicySpec:
    """What serving the policy needs.

    Args:
        backbone: as `backbone_directory` finds it.

    Raises:
        CheckpointError, TypeError, ValueError: what is missing or contradicts another file.
    """
    robot, head = RobotFacts(directory), head_config(directory, config)["action_head_cfg"]
    if robot.trained_prefix:
        raise ValueError(f"{ROBOT_FILE} says trained_prefix = {robot.trained_prefix}, of a policy that continues nothing")
    size = read_json(backbone / "config.json")["vision_config"].count("image_size")
    if is_lerobot(config):
        check_options(config, {"n_obs_steps": 1, "use_peft": False})
        state, action = _saved_statistics(directory)
        features = config["input_features"]
        cameras = tuple(
            robot.camera(key.rpartition(".")[2], key, (size, size), features[key]["shape"][1:], fit="stretch_torch")
            for key in sorted(key for key, feature in features.items() if feature["type"] == "VISUAL")
        )
    else:
        state, action = _metadata_statistics(directory, robot)
        cameras = tuple(robot.camera(name, name, (size, size), fit="stretch_linear") for name in robot.cameras)
    if not cameras:
        raise ValueError("there is no camera")
    robot.check_statistics(**{ACTION: action})
    if any(np.shape(part) != (len(robot.state_names),) for part in state.affine()):
        raise ValueError(f"the statistics of {STATE} are not of the {len(robot.state_names)} joints that are read")
    for width, names in (("max_state_dim", robot.state_names), ("action_dim", robot.joint_names)):
        if head.count(width) < len(names):
            raise ValueError(f"{width} is {head[width]} but {ROBOT_FILE} names {len(names)} joints")
    prompt = prompt_of(backbone, len(cameras))
    empty = read_tokenizer(tokenizer_path(backbone)).encode(prompt.format(instruction=str([""]))).ids
    return PolicySpec(
        family="groot",
        joint_names=robot.joint_names,
        cameras=cameras,
        chunk_size=head.count("action_horizon"),
        dt=robot.dt,
        num_steps=head.count("num_inference_timesteps"),
        max_state_dim=head.count("max_state_dim"),
        max_action_dim=head.count("action_dim"),
        tokenizer_max_length=len(empty) + INSTRUCTION_TOKENS,
        prompt=prompt,
        relative_actions=robot.relative_actions,
        state=state,
        action=action,
        text=TextSpec(listed=True),
        state_names=robot.state_names if robot.state_names != robot.joint_names else (),
    )


def is_lerobot(config: Document) -> bool:
    """Whether LeRobot has written the directory; Isaac-GR00T otherwise."""
    return "type" in config


def head_config(directory: Path, config: Document) -> Document:
    """With the sizes of the action head: config.json itself, or in LeRobot's layout the base model's.

    Raises:
        CheckpointError: the base model's is not at hand.
    """
    if not is_lerobot(config):
        return config
    name = str(config["base_model_path"])
    path = directory / name / "config.json"
    path = path if path.is_file() else in_hub_cache(name, "config.json")
    if path is None:
        raise CheckpointError(
            f"the base model {name!r} is not a directory inside {directory}, nor in Hugging Face's cache; copy its "
            f"config.json to {directory / name}, since it says what heads and flow steps the action head has"
        )
    return read_json(path)


def backbone_directory(directory: Path, config: Document) -> Path:
    """Where config.json and the tokenizer of Eagle 2.5 are: in the checkpoint or in LeRobot's cache.

    Raises:
        CheckpointError: nowhere.
    """
    name = str(config.get("tokenizer_assets_repo") or ASSETS)
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_LEROBOT_HOME") or hub / "lerobot")
    what = "GR00T's backbone (eagle2_hg_model)"
    return find_backbone(directory, name, [cache / name], "LeRobot's or Hugging Face's cache", what)


def find_backbone(directory: Path, name: str, places: Sequence[Path], caches: str, what: str) -> Path:
    """Where the files of a backbone are: in the checkpoint, in one of `places`, or in Hugging Face's cache.

    Args:
        name: of its repository. caches, what: for people, where it was looked for and of what.

    Raises:
        CheckpointError: nowhere.
    """
    found = in_hub_cache(name, "config.json")
    for place in (directory / BACKBONE, directory / name, *places, *((found.parent,) if found is not None else ())):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"{directory / BACKBONE} is not there, nor is {name} in {caches}; copy config.json, chat_template.json and the "
        f"tokenizer of {what} there"
    )


def tokenizer_path(backbone: Path) -> Path:
    """Its tokenizer.json.

    Raises:
        CheckpointError: there is none, or in the older form of two files.
    """
    if (path := backbone / "tokenizer.json").is_file():
        return path
    older = (backbone / "vocab.json").is_file()
    remedy = (
        f"have transformers write it: AutoTokenizer.from_pretrained({str(backbone)!r}).save_pretrained({str(backbone)!r})"
        if older
        else "copy the backbone's tokenizer there"
    )
    raise CheckpointError(f"{backbone} has {'vocab.json and ' if older else ''}no tokenizer.json; {remedy}")


def prompt_of(backbone: Path, cameras: int) -> str:
    """The chat template filled with pictures and the place of an instruction; each picture is one token here.

    Raises:
        CheckpointError: the template is missing, damaged, or has no place for them.
    """
    path, text = filled_template(backbone, cameras, answers=True)
    for number in range(1, cameras + 1):
        if text.count(f"<image-{number}>") != 1:
            raise CheckpointError(f"{path} has no place for picture {number}; copy the template of GR00T's backbone")
        text = text.replace(f"<image-{number}>", f"<image {number}>{BEGIN}{IMAGE}{END}")
    return as_prompt(path, text, IMAGE)


def filled_template(backbone: Path, cameras: int, answers: bool) -> tuple[Path, str]:
    """The file of a chat template, and what it makes of one message of pictures and an instruction, for which another text
    stands.

    Args:
        answers: whether the answer begins behind it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = backbone / "chat_template.json"
    if path.is_file():
        template = read_json(path)["chat_template"]
    elif (path := backbone / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8")
    else:
        raise CheckpointError(f"{backbone} has no chat_template.json; copy the backbone's there")
    content = [*({"type": "image", "image": ""} for _ in range(cameras)), {"type": "text", "text": _INSTRUCTION}]
    try:
        environment = ImmutableSandboxedEnvironment(  # as transformers fills them
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        messages = [{"role": "user", "content": content}]
        return path, environment.from_string(template).render(messages=messages, add_generation_prompt=answers)
    except TemplateError as error:
        raise CheckpointError(f"{path} is no chat template that can be filled ({error}); copy it again") from error


def as_prompt(path: Path, text: str, image: str) -> str:
    """A filled template as `PolicySpec.prompt`.

    Raises:
        CheckpointError: the instruction does not stand behind the pictures, the tokens `image`.
    """
    if text.count(_INSTRUCTION) != 1 or text.index(_INSTRUCTION) < text.rindex(image):
        raise CheckpointError(f"{path} does not put the instruction behind the pictures; copy that of GR00T's backbone")
    return text.replace("{", "{{").replace("}", "}}").replace(_INSTRUCTION, "{instruction}")


def embodiment(directory: Path, config: Document) -> int:
    """Which of the networks for state and actions are used.

    Raises:
        CheckpointError: it is not said, or not known.
    """
    robot = RobotFacts(directory)
    if is_lerobot(config):
        step = _steps(directory, PREPROCESSOR)[PACK]["config"]
        tag = robot.entries.get("embodiment_tag") or step["embodiment_tag"]
        return int(step["embodiment_mapping"].get(tag, 0))  # as LeRobot
    tag, path = _tag(directory, robot), directory / EMBODIMENT_IDS
    return number_of(tag, read_json(path) if path.is_file() else EMBODIMENTS, path)


def number_of(tag: str, known: Mapping[str, int], path: Path) -> int:
    """Of an embodiment's networks; `path`, for people, is where they may write it.

    Raises:
        CheckpointError: it is not known.
    """
    if tag not in known:
        raise CheckpointError(
            f"the embodiment tag {tag!r} has no number among {', '.join(sorted(known))}; write its own to {path}"
        )
    return int(known[tag])


def _tag(directory: Path, robot: RobotFacts) -> str:
    """The embodiment whose statistics are used.

    Raises:
        CheckpointError: there are none, or those of several and it is not said of which.
    """
    path = directory / METADATA
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {METADATA}, and without its statistics no action has a scale; copy it from where the "
            "policy was trained"
        )
    return tag_of(robot, read_json(path))


def tag_of(robot: RobotFacts, known: Document) -> str:
    """That of the embodiment whose statistics, among those `known`, are used.

    Raises:
        CheckpointError: it is not said, or there are none of it.
    """
    tag, path = robot.entries.get("embodiment_tag") or (next(iter(known)) if len(known) == 1 else None), known.path
    if tag not in known:
        raise CheckpointError(
            f"{path} has statistics of {', '.join(sorted(known)[:8]) or 'nothing'}, and {ROBOT_FILE} says embodiment_tag = "
            f"{tag!r}; name the embodiment the policy is for"
        )
    return tag


def _metadata_statistics(directory: Path, robot: RobotFacts) -> tuple[Normalization, Normalization]:
    """Of state and actions, out of those of single keys."""
    tag, found = _tag(directory, robot), []
    entry = read_json(directory / METADATA)[tag]
    for kind in ("state", "action"):
        keys = robot.entries.get(f"{kind}_keys")
        statistics, about = entry["statistics"][kind], entry["modalities"][kind]
        if not keys or set(keys) - set(statistics):
            raise CheckpointError(
                f"{robot.entries.path} says {kind}_keys = {keys!r}; name those of {', '.join(statistics)} that the policy's "
                "data configuration has, in its order"
            )
        for key in keys:
            if about[key].get("rotation_type"):
                raise CheckpointError(
                    f"{directory / METADATA} says that {kind}.{key} is a rotation; this version takes joint positions"
                )
        found.append(
            _bounds(kind, [np.concatenate([np.ravel(statistics[key][side]) for key in keys]) for side in ("min", "max")])
        )
    return found[0], found[1]


def _saved_statistics(directory: Path) -> tuple[Normalization, Normalization]:
    """Of state and actions, out of LeRobot's processors."""
    found = []
    for pipeline, name, feature in ((PREPROCESSOR, PACK, STATE), (POSTPROCESSOR, UNPACK, ACTION)):
        step, path = _steps(directory, pipeline)[name], directory / f"{pipeline}.json"
        if name == PACK:
            check_options(step["config"], {"formalize_language": False})
        if not step["config"].get("normalize_min_max", True):
            raise CheckpointError(f"{path} scales nothing (normalize_min_max); this version takes bounds of each joint")
        found.append(_bounds(feature, saved_bounds(directory, step, feature)))
    return found[0], found[1]


def saved_bounds(directory: Path, step: Document, feature: str) -> list[np.ndarray]:
    """Smallest and largest values, (D,) each, that a step of LeRobot's has saved.

    Raises:
        CheckpointError: they are missing.
    """
    saved = read_tensors(directory / step["state_file"], "numpy") if "state_file" in step else {}
    missing = [side for side in ("min", "max") if f"{feature}.{side}" not in saved]
    if missing:
        raise CheckpointError(
            f"{step.path} has no {' and no '.join(missing)} of {feature}, so it cannot be scaled; give the statistics of the "
            "data it was trained on"
        )
    return [np.ravel(saved[f"{feature}.{side}"]) for side in ("min", "max")]


def _steps(directory: Path, pipeline: str) -> dict[str, Document]:
    return needed_steps(directory, pipeline, _KNOWN[pipeline], (PACK if pipeline == PREPROCESSOR else UNPACK,))


def needed_steps(directory: Path, pipeline: str, known: Collection[str], needed: Sequence[str]) -> dict[str, Document]:
    """`read_steps`.

    Raises:
        CheckpointError: also where one of those `needed` is missing.
    """
    steps = read_steps(directory, pipeline, known)
    for name in needed:
        if name not in steps:
            raise CheckpointError(f"{directory / pipeline}.json has no step {name}; copy it from the training run")
    return steps


def _bounds(feature: str, sides: Sequence[np.ndarray]) -> Normalization:
    low, high = (np.asarray(side, np.float64) for side in sides)
    if low.shape != high.shape or not np.isfinite([*low, *high]).all():
        raise ValueError(f"of {feature} there are {len(low)} smallest and {len(high)} largest values, or one is not finite")
    bounds = {"min": tuple(low.tolist()), "max": tuple(high.tolist())}
    return Normalization(NormalizationMode.MIN_MAX, bounds, fixed=True)
