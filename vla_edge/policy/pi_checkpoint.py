"""A pi0 or pi0.5 out of LeRobot's `pretrained_model/` or of what openpi's conversion to PyTorch writes.

Both use the same names, but for a `model.` in front of LeRobot's. Sizes are those of the tensors. Two that no tensor
tells are the same in every PaliGemma: SigLIP's 16 heads, and one head of keys and values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vla_edge.policy.checkpoint_files import CheckpointError, Document, in_hub_cache, read_json, read_tokenizer
from vla_edge.policy.checkpoint_processors import PI05_PROMPT, PREPROCESSOR
from vla_edge.policy.families import Description
from vla_edge.policy.lerobot_layout import check_options, lerobot_spec
from vla_edge.policy.robot_facts import ROBOT_FILE, RobotFacts
from vla_edge.policy.spec import Normalization, NormalizationMode, PolicySpec, TextSpec
from vla_edge.policy.weights import OnDemand, Weights, find_weights

if TYPE_CHECKING:
    from vla_edge.policy.checkpoint import Checkpoint
    from vla_edge.policy.paligemma import PiConfig

VISION_HEADS, KV_HEADS = 16, 1
TOKENIZER = "google/paligemma-3b-pt-224"
# the arithmetic of openpi's PyTorch port, which its config.json leaves out
OPENPI_IMAGE, OPENPI_STEPS, OPENPI_EPS = (224, 224), 10, 1e-6
PERIODS = (4e-3, 4.0)
# in LeRobot's port the padding is -1 before images are scaled from [0, 1] to [-1, 1]
LEROBOT_PADDING = -3.0

_VLM, _EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
_VISION, _TEXT = f"{_VLM}model.vision_tower.vision_model.", f"{_VLM}model.language_model."
_EMBEDDING, _HEAD = f"{_TEXT}embed_tokens.weight", f"{_VLM}lm_head.weight"
_ENCODER_LAYER = {
    "attention_norm": "layer_norm1", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "out": "self_attn.out_proj", "mlp_norm": "layer_norm2", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}  # fmt: skip
_GEMMA_LAYER = {
    "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
_SINGLE = {
    "vision.encoder.patch_embedding": f"{_VISION}embeddings.patch_embedding",
    "vision.encoder.position_embedding": f"{_VISION}embeddings.position_embedding",
    "vision.encoder.norm": f"{_VISION}post_layernorm",
    "vision.projector": f"{_VLM}model.multi_modal_projector.linear",
    "prefix.embedding": f"{_TEXT}embed_tokens",
    "prefix.state_proj": "state_proj",
    "denoise.norm": f"{_EXPERT}model.norm",
    "denoise.action_in": "action_in_proj",
    "denoise.action_out": "action_out_proj",
    "denoise.mlp_out": "action_time_mlp_out",
    "time.mlp_out": "time_mlp_out",
}


def describe(directory: Path, config: Document) -> Description:
    """See `families`."""
    robot = RobotFacts(directory)
    if "type" in config:
        check_options(config, {"use_peft": False})
        fit = {"fit": "centre", "padding": LEROBOT_PADDING}
        size = tuple(config["image_resolution"])
        spec = lerobot_spec(directory, config, robot, size, config.count("num_inference_steps"), **fit)
    else:
        spec = _openpi_spec(directory, config, robot)
    return Description(spec, _tokenizer(directory))


def build(checkpoint: Checkpoint, weights: Weights):
    """See `families`."""
    from vla_edge.policy.pi0 import Pi0
    from vla_edge.policy.pi05 import Pi05

    kind = Pi05 if checkpoint.spec.family == "pi05" else Pi0
    return kind(pi_config(checkpoint, _plain(weights)))


def tensors(policy, checkpoint: Checkpoint, weights: Weights) -> OnDemand:
    """See `families`."""
    plain, config = _plain(weights), policy.config
    joint = {"time.mlp_in.weight", "time.mlp_in.bias", "denoise.mlp_in.weight"}  # of a pi0, one layer in its file
    joint = joint if "denoise.mlp_in.weight" in policy.state_dict() else set()
    spelled = {
        name: f"action_time_mlp_in.{name.rpartition('.')[2]}" if name in joint else file_name(name, config)
        for name in policy.state_dict()
    }
    if _EMBEDDING not in plain and _HEAD in plain:  # they are one tensor, saved under either name
        spelled["prefix.embedding.weight"] = _HEAD
    plain.check(spelled.values(), lambda name: _is_unused(name, config.text_layers))
    width, likes = config.expert_width, policy.state_dict()

    def made(name: str):
        tensor = plain[spelled[name]]
        if name == "denoise.mlp_in.weight":
            return tensor[:, :width]
        if name in joint and tensor.ndim == 2:
            return tensor[:, width:]
        if name.endswith("patch_embedding.weight"):
            return tensor.reshape(likes[name].shape)
        if re.search(r"(prefix|denoise)\..*norm\.weight$", name):
            return 1 + tensor.float()  # Gemma stores the difference to one
        return tensor

    return OnDemand(likes, made)


def pi_config(checkpoint: Checkpoint, weights: Weights) -> PiConfig:
    """Shapes for `Pi0` and `Pi05`.

    Raises:
        CheckpointError: a tensor is missing, or the shapes contradict config.json.
    """
    from vla_edge.policy.paligemma import PiConfig

    spec, config = checkpoint.spec, checkpoint.config
    vocabulary, text_width = weights.shape(_EMBEDDING if _EMBEDDING in weights else _HEAD)
    vision_width, _, patch, _ = weights.shape(f"{_VISION}embeddings.patch_embedding.weight")
    head_dim = weights.shape(f"{_TEXT}layers.0.self_attn.k_proj.weight")[0] // KV_HEADS
    expert_hidden, expert_width = weights.shape(f"{_EXPERT}model.layers.0.mlp.up_proj.weight")
    tokens = read_tokenizer(checkpoint.tokenizer_path).get_vocab_size()
    if tokens > vocabulary:
        raise CheckpointError(
            f"{checkpoint.tokenizer_path} has {tokens} tokens and the weights {vocabulary}; copy the tokenizer the "
            "policy was trained with"
        )
    size = spec.cameras[0].height
    if any((camera.height, camera.width) != (size, size) for camera in spec.cameras) or size % patch:
        raise CheckpointError(
            f"{config.path} resizes images to {size} x {spec.cameras[0].width} px; this version takes squares whose "
            f"side is a multiple of {patch} px"
        )
    return PiConfig(
        cameras=len(spec.cameras),
        image_size=size,
        patch_size=patch,
        vision_width=vision_width,
        vision_hidden=weights.shape(f"{_VISION}encoder.layers.0.mlp.fc1.weight")[0],
        vision_layers=weights.count(f"{_VISION}encoder.layers.{{}}.mlp.fc1.weight"),
        vision_heads=VISION_HEADS,
        vocabulary=vocabulary,
        text_width=text_width,
        text_hidden=weights.shape(f"{_TEXT}layers.0.mlp.up_proj.weight")[0],
        text_layers=weights.count(f"{_TEXT}layers.{{}}.mlp.up_proj.weight"),
        heads=weights.shape(f"{_TEXT}layers.0.self_attn.q_proj.weight")[0] // head_dim,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        expert_width=expert_width,
        expert_hidden=expert_hidden,
        chunk_size=spec.chunk_size,
        max_state_dim=spec.max_state_dim,
        max_action_dim=spec.max_action_dim,
        language_length=spec.tokenizer_max_length,
        min_period=config.get("min_period", PERIODS[0]),
        max_period=config.get("max_period", PERIODS[1]),
    )


def file_name(name: str, config: PiConfig) -> str:
    """openpi's name of our parameter (not of the two halves of a pi0's action-time MLP)."""
    module, _, kind = name.rpartition(".")
    if module in _SINGLE:
        return f"{_SINGLE[module]}.{kind}"
    if match := re.fullmatch(r"vision\.encoder\.layers\.(\d+)\.(.+)", module):
        return f"{_VISION}encoder.layers.{match[1]}.{_ENCODER_LAYER[match[2]]}.{kind}"
    if match := re.fullmatch(r"prefix\.layers\.(\d+)\.(.+)", module):
        return f"{_TEXT}layers.{match[1]}.{_GEMMA_LAYER[match[2]]}.{kind}"
    if match := re.fullmatch(r"prefix\.last(?:_norm|\.([kv]))", module):
        return f"{_TEXT}layers.{config.text_layers - 1}.{_GEMMA_LAYER[match[1] or 'attention_norm']}.{kind}"
    if match := re.fullmatch(r"denoise\.layers\.(\d+)\.(.+)", module):
        return f"{_EXPERT}model.layers.{match[1]}.{_GEMMA_LAYER[match[2]]}.{kind}"
    if match := re.fullmatch(r"time\.norms\.(\d+)", module):
        layer, second = divmod(int(match[1]), 2)
        norm = _GEMMA_LAYER["mlp_norm" if second else "attention_norm"]
        place = "norm" if layer == config.text_layers else f"layers.{layer}.{norm}"
        return f"{_EXPERT}model.{place}.dense.{kind}"
    if module == "time.mlp_in":
        return f"time_mlp_in.{kind}"
    raise KeyError(name)


def _plain(weights: Weights) -> Weights:
    """Under openpi's names."""
    return weights.renamed(lambda name: name.removeprefix("model."))


def _is_unused(name: str, text_layers: int) -> bool:
    """What comes after the last keys and values, and the heads of the language models."""
    last = f"{_TEXT}layers.{text_layers - 1}."
    return name.startswith((last, f"{_TEXT}norm.")) or name in (_EMBEDDING, _HEAD, f"{_EXPERT}lm_head.weight")


def _openpi_spec(directory: Path, config: Document, robot: RobotFacts) -> PolicySpec:
    """What openpi's transforms do, as far as they belong to the model and not to a robot."""
    later = "time_mlp_in.weight" in _plain(Weights(find_weights(directory)))
    state, action = _openpi_statistics(directory, robot, quantiles=later)
    joints, width = robot.joint_names, config.count("action_dim")
    if width < len(joints):
        raise ValueError(f"action_dim is {width} but {ROBOT_FILE} names {len(joints)} joints")
    if not robot.cameras:
        raise ValueError(f"{ROBOT_FILE} names no camera")
    return PolicySpec(
        family="pi05" if later else "pi0",
        joint_names=joints,
        cameras=tuple(robot.camera(name, name, OPENPI_IMAGE, fit="letterbox") for name in robot.cameras),
        chunk_size=config.count("action_horizon"),
        dt=robot.dt,
        num_steps=OPENPI_STEPS,
        max_state_dim=width,
        max_action_dim=width,
        tokenizer_max_length=200 if later else 48,
        prompt=PI05_PROMPT if later else "{instruction}\n",
        relative_actions=robot.relative_actions,
        state=state,
        action=action,
        text=TextSpec(plain=True, state_dims=len(joints) if later else 0),
    )


def _openpi_statistics(directory: Path, robot: RobotFacts, quantiles: bool) -> tuple[Normalization, Normalization]:
    """Of state and actions.

    Raises:
        CheckpointError: there are none, or of several robots.
    """
    found = sorted(directory.glob("assets/**/norm_stats.json"))
    if len(found) != 1:
        told = f"{len(found)} files assets/*/norm_stats.json" if found else "no assets/<robot>/norm_stats.json"
        raise CheckpointError(
            f"{directory} has {told}, and without its statistics no action has a scale; leave the one of the robot it "
            "was trained for"
        )
    entries, joints = read_json(found[0])["norm_stats"], len(robot.joint_names)
    made = []
    for feature in ("state", "actions"):
        numbers = {name: np.asarray(entries[feature][name], np.float64)[:joints] for name in _used(quantiles)}
        if quantiles:  # x = (value - q01) / (q99 - q01 + eps) * 2 - 1
            numbers["q99"] = numbers["q99"] + OPENPI_EPS
        plain = {name: tuple(values.tolist()) for name, values in numbers.items()}
        mode = NormalizationMode.QUANTILES if quantiles else NormalizationMode.MEAN_STD
        made.append(Normalization(mode, plain, OPENPI_EPS))
    robot.check_statistics(state=made[0], actions=made[1])
    return made[0], made[1]


def _used(quantiles: bool) -> tuple[str, str]:
    return ("q01", "q99") if quantiles else ("mean", "std")


def _tokenizer(directory: Path) -> Path:
    """PaliGemma's tokenizer.json: in the checkpoint, where its processor says, or in an existing hub cache.

    Raises:
        CheckpointError: it is in none of them.
    """
    preprocessor, name = directory / f"{PREPROCESSOR}.json", TOKENIZER
    if preprocessor.is_file():
        steps = {step.get("registry_name"): step.get("config", {}) for step in read_json(preprocessor)["steps"]}
        name = steps.get("tokenizer_processor", {}).get("tokenizer_name") or TOKENIZER
    for path in (directory / "tokenizer.json", directory / name / "tokenizer.json", in_hub_cache(name, "tokenizer.json")):
        if path is not None and path.is_file():
            return path
    raise CheckpointError(
        f"{directory} has no tokenizer.json, and Hugging Face's cache has none of {name}; copy tokenizer.json of {name} "
        "there"
    )
