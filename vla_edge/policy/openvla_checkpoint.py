"""An OpenVLA or OpenVLA-OFT out of its Hugging Face directory.

Statistics are those of one data set, which `unnorm_key` in vla_edge.json names where there are several: in config.json,
or, as OFT writes them, in dataset_statistics.json. OFT's head and projector of the state lie beside as safetensors, and so
does a draft: `draft.safetensors` of `vla-edge draft`, or Medusa's heads, whose tensors may also lie in the shards.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vla_edge.policy import draft_shapes
from vla_edge.policy.bins import BINS
from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json, read_tokenizer
from vla_edge.policy.draft_shapes import DraftConfig
from vla_edge.policy.families import Description
from vla_edge.policy.robot_facts import ROBOT_FILE, RobotFacts
from vla_edge.policy.spec import Normalization, NormalizationMode, PolicySpec, TextSpec
from vla_edge.policy.weights import CONVERT, OnDemand, Weights

if TYPE_CHECKING:
    from vla_edge.policy.checkpoint import Checkpoint
    from vla_edge.policy.openvla import OpenVLAConfig

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
EMPTY_WORD = 29871  # Llama's, with which prompts ended in training
LANGUAGE_LENGTH = 64
STATISTICS = "dataset_statistics.json"
HEAD, PROPRIO = "action_head", "proprio_projector"
DRAFT, MEDUSA = "draft", "medusa_lm_head"
"""Files beside the shards: those of OFT's parts, and of what proposes tokens (`openvla_draft`)."""
_MEDUSA = "medusa_head."  # how its tensors begin, in the shards or in a file of their own
# timm's, of which no tensor tells
HEADS = {"vit_large_patch14_reg4_dinov2.lvd142m": 16, "vit_so400m_patch14_siglip_224": 16}
# what transformers leaves out of a Llama's config.json
_LLAMA_DEFAULTS = {"num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_SUPPORTED = {"use_fused_vision_backbone": True, "image_resize_strategy": "resize-naive", "n_action_bins": 256}
_BOUNDS = {NormalizationMode.QUANTILES: ("q01", "q99"), NormalizationMode.MIN_MAX: ("min", "max")}

_TOWERS = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
_TEXT = "language_model.model."
_LLM_HEAD = "language_model.lm_head.weight"
WORDS = (f"{_TEXT}embed_tokens.weight", _LLM_HEAD)
"""Tables of all words, of which actions take 256 rows."""
LLAMA_LAYER = {
    "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
"""Ours -> Llama's names within a layer."""
_BLOCK = {"attention_norm": "norm1", "out": "attn.proj", "mlp_norm": "norm2", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
_TOKENS = ("prefill", "decode", "verify", "revise")  # stages that score and read tokens of actions
_HEAD_PARTS = {"norm_in": "layer_norm1", "linear_in": "fc1", "norm_out": "layer_norm2", "linear_out": "fc2"}


def describe(directory: Path, config: Document) -> Description:
    """See `families`."""
    for option, value in _SUPPORTED.items():
        if (found := config.get(option, value)) != value:
            raise CheckpointError(f"{config.path} says {option} = {found!r}; this version loads {option} = {value!r}")
    robot = RobotFacts(directory)
    parallel = _part(directory, HEAD)
    state, action = _statistics(directory, config, robot)
    joints = robot.joint_names
    robot.check_statistics(action=action)
    proprio = _part(directory, PROPRIO) if parallel else None
    read = robot.state_names if proprio else ()
    if proprio and any(np.shape(part) not in ((), (len(read),)) for part in state.affine()):
        raise ValueError(f"the statistics of proprio are not of the {len(read)} joints that are read")
    size = config["image_sizes"][0]
    spec = PolicySpec(
        family="openvla",
        joint_names=joints,
        cameras=tuple(robot.camera(name, name, (size, size), fit="stretch") for name in robot.cameras),
        chunk_size=robot.entries.count("chunk_size") if parallel else 1,
        dt=robot.dt,
        num_steps=1,
        max_state_dim=len(read or joints),
        max_action_dim=len(joints),
        tokenizer_max_length=LANGUAGE_LENGTH,
        prompt=PROMPT,
        relative_actions=robot.relative_actions,
        state=state if proprio else Normalization(NormalizationMode.IDENTITY),
        action=action,
        text=TextSpec(lower=True, last=(EMPTY_WORD,)),
        state_names=read,
    )
    if not spec.cameras:
        raise ValueError(f"{ROBOT_FILE} names no camera")
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json; copy it from where the policy was trained")
    return Description(spec, tokenizer)


def build(checkpoint: Checkpoint, weights: Weights):
    """See `families`."""
    from vla_edge.policy.openvla import OpenVLA

    return OpenVLA(openvla_config(checkpoint, _all(checkpoint, weights)))


def tensors(policy, checkpoint: Checkpoint, weights: Weights) -> OnDemand:
    """See `families`."""
    everything, config = _all(checkpoint, weights), policy.config
    found = {name: file_names(name) for name in policy.state_dict()}
    read = {file for files in found.values() for file in files}
    scales = {scale for scale in map(scale_of, read) if scale in everything}
    layers = [tower.layers for tower in config.towers]
    kind = None if config.draft is None else config.draft.kind
    drafts = {draft_shapes.BLOCK: f"{DRAFT}.", draft_shapes.MEDUSA: _MEDUSA}
    others = tuple(prefix for draft, prefix in drafts.items() if draft != kind)
    if kind == draft_shapes.MEDUSA:  # more heads than tokens can follow
        others += tuple(f"{_MEDUSA}{head}." for head in range(config.draft.most_tokens, config.draft.places))
    everything.check(read | scales, lambda name: _is_unused(name, layers) or name.startswith(others))
    action_end = first_action_token(checkpoint, config.vocabulary) + BINS
    likes = policy.state_dict()

    def made(name: str):
        like, scale = likes[name], scale_of(found[name][0])
        tensor = _shaped(name, [everything[file] for file in found[name]], like, action_end)
        if scale in scales:  # what a layer gives is multiplied by it, so the layer can be
            gain = everything[scale].float()
            tensor = tensor.float() * (gain[:, None] if like.ndim == 2 else gain)
        return tensor

    return OnDemand(likes, made)


def openvla_config(checkpoint: Checkpoint, weights: Weights) -> OpenVLAConfig:
    """Shapes for `OpenVLA`.

    Raises:
        CheckpointError: a tensor is missing, or the shapes contradict config.json.
    """
    from vla_edge.policy.openvla import IMAGENET, OpenVLAConfig, TowerConfig

    config, spec = checkpoint.config, checkpoint.spec
    text = Document(config.path, {**_LLAMA_DEFAULTS, **config["text_config"]})
    towers = []
    for prefix, model, (mean, std) in zip(_TOWERS, config["timm_model_ids"], (IMAGENET, ((0.5,) * 3, (0.5,) * 3))):
        if model not in HEADS:
            raise CheckpointError(f"{config.path} names the vision tower {model!r}; this version loads {', '.join(HEADS)}")
        width, _, patch, _ = weights.shape(f"{prefix}patch_embed.proj.weight")
        registers = [weights.shape(f"{prefix}{name}")[1] for name in ("cls_token", "reg_token") if f"{prefix}{name}" in weights]
        hidden = weights.shape(f"{prefix}blocks.0.mlp.fc1.weight")[0]
        blocks = weights.count(f"{prefix}blocks.{{}}.mlp.fc1.weight") - 1  # features are those before the last
        towers.append(TowerConfig(patch, width, hidden, blocks, HEADS[model], sum(registers), mean, std))
    vocabulary, width = weights.shape(f"{_TEXT}embed_tokens.weight")
    tokens = read_tokenizer(checkpoint.tokenizer_path).get_vocab_size()
    if tokens > vocabulary:
        raise CheckpointError(
            f"{checkpoint.tokenizer_path} has {tokens} tokens and the weights {vocabulary}; copy the tokenizer the "
            "policy was trained with"
        )
    heads = text.count("num_attention_heads")
    parallel = f"{HEAD}.model.fc1.weight" in weights
    return OpenVLAConfig(
        cameras=len(spec.cameras),
        image_size=spec.cameras[0].height,
        towers=tuple(towers),
        projector=tuple(weights.shape(f"projector.fc{i}.weight")[0] for i in (1, 2)),
        vocabulary=vocabulary,
        width=width,
        hidden=weights.shape(f"{_TEXT}layers.0.mlp.up_proj.weight")[0],
        layers=weights.count(f"{_TEXT}layers.{{}}.mlp.up_proj.weight"),
        heads=heads,
        kv_heads=weights.shape(f"{_TEXT}layers.0.self_attn.k_proj.weight")[0] * heads // width,
        eps=text["rms_norm_eps"],
        wavelength=text["rope_theta"],
        language_length=spec.tokenizer_max_length,
        action_dim=len(spec.joint_names),
        chunk_size=spec.chunk_size,
        head_hidden=weights.shape(f"{HEAD}.model.fc1.weight")[0] if parallel else 0,
        head_blocks=weights.count(f"{HEAD}.model.mlp_resnet_blocks.{{}}.ffn.1.weight") if parallel else 0,
        proprio_dim=len(spec.state_names),
        draft=None if parallel else _draft_config(weights, width, spec.chunk_size * len(spec.joint_names)),
    )


def first_action_token(checkpoint: Checkpoint, vocabulary: int) -> int:
    """Id of the first of the 256 tokens of actions, the last words before what the vocabulary is padded with."""
    return vocabulary - checkpoint.config.get("pad_to_multiple_of", 64) - BINS


def _draft_config(weights: Weights, feature: int, places: int) -> DraftConfig | None:
    """Of what proposes tokens: a trained block, else Medusa's heads; None where neither is, or nothing can be proposed."""
    most = places - 2
    if most < 1:
        return None
    if f"{DRAFT}.places.weight" in weights:
        width = weights.shape(f"{DRAFT}.places.weight")[1]
        layers, hidden = weights.count(f"{DRAFT}.layers.{{}}.q.weight"), weights.shape(f"{DRAFT}.layers.0.mlp.up.weight")[0]
        return DraftConfig(draft_shapes.BLOCK, feature, places, layers, most, width, hidden)
    if not any(name.startswith(_MEDUSA) for name in weights):
        return None
    layers = 0
    while f"{_MEDUSA}0.{layers}.linear.weight" in weights:
        layers += 1
    heads = weights.count(f"{_MEDUSA}{{}}.{layers}.weight")
    return DraftConfig(draft_shapes.MEDUSA, feature, places, layers, min(heads, most))


def file_names(name: str) -> tuple[str, ...]:
    """The tensors that ours is made of: one, but for registers, which are joined."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"vision\.encoders\.(\d)\.?(.*)", module):
        return _tower_names(_TOWERS[int(match[1])], match[2], kind)
    if match := re.fullmatch(r"vision\.projector\.(\d+)", module):
        return (f"projector.fc{int(match[1]) + 1}.{kind}",)
    stage, _, inner = module.partition(".")
    if stage == DRAFT:
        return (f"{_MEDUSA}{name.removeprefix('draft.heads.')}" if inner.startswith("heads.") else name,)
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", inner):
        return (f"{_TEXT}layers.{match[1]}.{LLAMA_LAYER[match[2]]}.{kind}",)
    if inner in ("embedding", "words"):
        return (f"{_TEXT}embed_tokens.{kind}",)
    if inner == "norm":
        return (f"{_TEXT}norm.{kind}",)
    if stage in _TOKENS and inner == "head":
        return (_LLM_HEAD,)
    if match := re.fullmatch(r"head\.blocks\.(\d+)\.(norm|linear)", inner):
        return (f"{HEAD}.model.mlp_resnet_blocks.{match[1]}.ffn.{int(match[2] == 'linear')}.{kind}",)
    if inner.startswith("head."):
        return (f"{HEAD}.model.{_HEAD_PARTS[inner.removeprefix('head.')]}.{kind}",)
    if inner in ("state_in", "state_out"):
        return (f"{PROPRIO}.fc{1 + (inner == 'state_out')}.{kind}",)
    raise KeyError(name)


def _tower_names(prefix: str, module: str, kind: str) -> tuple[str, ...]:
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        part = "attn.qkv" if match[2] in "qkv" else _BLOCK[match[2]]
        return (f"{prefix}blocks.{match[1]}.{part}.{kind}",)
    if kind == "registers":
        return (f"{prefix}cls_token", f"{prefix}reg_token")
    single = {"patch_embedding": f"patch_embed.proj.{kind}", "position_embedding": "pos_embed"}
    return (f"{prefix}{single[module]}",)


def scale_of(file: str) -> str | None:
    """The tensor by which timm multiplies what the layer gives that `file` is of."""
    half = {"attn.proj": 1, "mlp.fc2": 2}
    match = re.fullmatch(r"(.*blocks\.\d+\.)(attn\.proj|mlp\.fc2)\.(weight|bias)", file)
    return f"{match[1]}ls{half[match[2]]}.scale_factor" if match else None


def _shaped(name: str, tensor: list, like, action_end: int):
    """Ours, out of what the file holds. `action_end`: the id after that of the last action token."""
    import torch

    module, _, _ = name.rpartition(".")
    first = tensor[0]
    if name.endswith(".registers"):
        return torch.cat(tensor, dim=1)
    if match := re.fullmatch(r"vision\..*\.([qkv])", module):
        return first.chunk(3)["qkv".index(match[1])]
    ahead = module.startswith("draft.heads.") and len(first) > len(like)  # Medusa's heads may score all words
    if ahead or module in {f"{stage}.{part}" for stage in _TOKENS for part in ("head", "words")}:
        return first[action_end - like.shape[0] : action_end]
    return first.reshape(like.shape)


def _is_unused(name: str, layers: list[int]) -> bool:
    """The last block of each tower and what follows it; of OFT, the language model's head."""
    if name == _LLM_HEAD or name.endswith("rotary_emb.inv_freq"):
        return True
    return any(
        name.startswith((f"{tower}blocks.{count}.", f"{tower}norm.", f"{tower}attn_pool."))
        for tower, count in zip(_TOWERS, layers)
    )


def files_of(checkpoint: Checkpoint) -> dict[Path, str]:
    """The shards, and OFT's parts: file -> what is put in front of its tensors' names, which begin with "module." where
    they were trained in parallel."""
    return dict.fromkeys(checkpoint.weights, "") | {path: f"{part}." for path, part in _parts(checkpoint).items()}


def _all(checkpoint: Checkpoint, weights: Weights) -> Weights:
    return weights.renamed(lambda name: name.removeprefix("module."), _parts(checkpoint) | _drafts(checkpoint))


def _parts(checkpoint: Checkpoint) -> dict[Path, str]:
    parts = {_part(checkpoint.directory, part): part for part in (HEAD, PROPRIO)}
    parts.pop(None, None)
    return parts


def _drafts(checkpoint: Checkpoint) -> dict[Path, str]:
    """Files of drafts -> what is put in front of their tensors' names; Medusa's has them with its own or without."""
    found = {}
    if block := _part(checkpoint.directory, DRAFT):
        found[block] = DRAFT
    if heads := _part(checkpoint.directory, MEDUSA):
        named = any(name.startswith(_MEDUSA) for name in Weights((heads,)))
        found[heads] = "" if named else _MEDUSA.removesuffix(".")
    return found


def _part(directory: Path, name: str) -> Path | None:
    """The file of a part beside the shards, or None where there is none.

    Raises:
        CheckpointError: it is a pickle.
    """
    if found := sorted(directory.glob(f"{name}*.safetensors")):
        return found[-1]
    if found := sorted(directory.glob(f"{name}*.pt")):
        raise CheckpointError(
            f"{found[-1]} is a pickle, which may run code when it is opened; convert it to safetensors with {CONVERT}"
        )
    return None


def _statistics(directory: Path, config: Document, robot: RobotFacts) -> tuple[Normalization, Normalization]:
    """Of state and action.

    Raises:
        CheckpointError: there are none, or it is not said of which data set.
    """
    beside = directory / STATISTICS
    sets = read_json(beside) if beside.is_file() else config.get("norm_stats") or {}
    key = robot.entries.get("unnorm_key") or (next(iter(sets)) if len(sets) == 1 else None)
    if key not in sets:
        told = f"has statistics of {', '.join(sorted(sets)[:8])}" if sets else "has no statistics (norm_stats)"
        raise CheckpointError(
            f"{beside if beside.is_file() else config.path} {told}, and {ROBOT_FILE} says unnorm_key = {key!r}; name "
            "the data set the robot's actions are scaled by"
        )
    mode = NormalizationMode(robot.entries.get("normalization", "QUANTILES"))
    entries = sets[key]
    return (
        _normalization(entries["proprio"], mode, 1e-8, True) if "proprio" in entries else
        Normalization(NormalizationMode.IDENTITY),
        _normalization(entries["action"], mode, 0.0, False),
    )  # fmt: skip


def _normalization(entry: Document, mode: NormalizationMode, eps: float, clip: bool) -> Normalization:
    """Bounds by `mode`; dimensions that are masked out stay as they are, which bounds of -1 and 1 do."""
    names = _BOUNDS[mode]
    low, high = (np.asarray(entry[name], np.float64) for name in names)
    mask = np.asarray(entry.get("mask", np.ones(len(low), bool)), bool)
    low, high = np.where(mask, low, -1.0), np.where(mask, high + eps, 1.0)
    return Normalization(mode, {names[0]: tuple(low.tolist()), names[1]: tuple(high.tolist())}, clip=clip)
