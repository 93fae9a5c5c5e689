"""Write a random GR00T N1.7 as LeRobot or Isaac-GR00T saves it, and what LeRobot's port makes of a few observations.

    python tools/parity/generate_groot17.py --variant lerobot --output test/parity/groot17/lerobot

Nothing of vla_edge is imported. The networks, the processors and the backbone's are LeRobot's and transformers' own;
Isaac-GR00T's directory is read by LeRobot too, which takes it as a base model.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import json
import os
import re
import shutil
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# torchvision's wheels are built for CUDA; beside a CPU torch the operators this part describes do not exist
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from random_policies import (  # noqa: E402
    ACTION,
    STATE,
    TASKS,
    WORDS,
    Camera,
    asked,
    cropped,
    picture,
    randomize_,
    statistics,
    write_robot_facts,
)

IMAGE, VIDEO, BEGIN, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", BEGIN, END, IMAGE, VIDEO)
# what Qwen3-VL's gives for one user's pictures and words, in other words
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + BEGIN + IMAGE + END +
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, SIDE, WIDTH, ROWS = 8, 6, 32, 8
STATE_DIM, ACTION_DIM = 12, 8
NORMS = ("norm1.weight", "norm2.weight", "norm3.weight", "vlln.weight", "norm.weight")
BASE, BACKBONE = "./base", "./backbone"


@dataclass(frozen=True)
class Variant:
    """Options of one reference policy.

    Attributes:
        pictures: entries of processor_config.json. points: of a chunk, of which the network makes `ROWS`.
        state_keys, action_keys: modalities -> joints, in the policy's order; `joints` and LeRobot's statistics where
            there are none. relative: action keys that are told from the measured positions on.
        alternates: whether layers look at pictures or words, and not at both.
    """

    cameras: dict[str, Camera]
    embodiment: str
    pictures: dict
    joints: int = 5
    points: int = 6
    steps: int = 4
    alternates: bool = True
    percentiles: bool = False
    state_keys: dict[str, int] = field(default_factory=dict)
    action_keys: dict[str, int] = field(default_factory=dict)
    relative: tuple[str, ...] = ()


VARIANTS = {
    # one's own data, without keys: the whole state and action scaled by their bounds
    "lerobot": Variant(
        {"wrist": Camera(52, 66, (0, 0, 52, 66)), "head": Camera(60, 80, (2, 5, 52, 66))}, "new_embodiment",
        {"image_target_size": [64, 64], "image_crop_size": [58, 58], "formalize_language": False},
    ),
    # a base model's keys, of which the arm's are offsets, each point of a chunk with bounds of its own
    "keys": Variant(
        {"wrist": Camera(52, 66, (0, 0, 52, 66)), "head": Camera(60, 80, (2, 5, 52, 66))}, "xdof_relative_eef_relative_joint",
        {"image_target_size": [64, 64], "crop_fraction": 0.95, "shortest_image_edge": 64}, alternates=False, steps=5,
        state_keys={"arm": 3, "gripper": 2}, action_keys={"arm": 3, "gripper": 2}, relative=("arm",),
    ),
    # Isaac-GR00T's directory: shards, pictures that keep their aspect, quantiles, a state of more joints than are moved
    "isaac": Variant(
        {"head": Camera(60, 80, (2, 5, 56, 70))}, "unitree_g1_sonic",
        {"image_target_size": [64, 64], "crop_fraction": 0.95, "shortest_image_edge": 64, "use_albumentations": True},
        percentiles=True, steps=4, state_keys={"waist": 2, "arm": 3, "hand": 2}, action_keys={"hand": 2, "arm": 3},
        relative=("arm",),
    ),
}  # fmt: skip


def main() -> None:
    arguments = asked(__doc__, VARIANTS)
    variant, output = VARIANTS[arguments.variant], arguments.output
    checkpoint = output / "checkpoint"
    shutil.rmtree(output, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    os.chdir(checkpoint)  # to which the places of base model and backbone are relative
    read_newer_python()
    write_backbone(checkpoint / BACKBONE, variant, older=arguments.variant == "isaac")
    rng = np.random.default_rng(arguments.seed)
    made = (as_isaac if arguments.variant == "isaac" else as_lerobot)(checkpoint, variant, rng)
    arrays = references(made, variant, np.random.default_rng(1))
    np.savez_compressed(output / "reference.npz", **arrays)
    keep = ("config.json", "tokenizer.json", "chat_template.json", "preprocessor_config.json")
    for path in (checkpoint / BACKBONE).iterdir():
        if path.name not in keep:
            path.unlink()
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>9} {path.relative_to(output)}")


def read_newer_python() -> None:
    """LeRobot's type parameters, which Python has from 3.12 on, as those before write them."""
    if sys.version_info >= (3, 12):
        return
    compiled = importlib.machinery.SourceFileLoader.source_to_code
    builtins.Generic = typing.Generic

    def older(self, data, path, **named):
        if "/lerobot/" in path:
            text = data.decode()
            for parameters in re.findall(r"^\s*(?:class|def) \w+\[([^\]]*)\]", text, re.MULTILINE):
                for name in (each.partition(":")[0].strip() for each in parameters.split(",")):
                    setattr(builtins, name, typing.TypeVar(name))
            for pattern, told in (
                (r"^(\s*class \w+)\[([^\]:]*)\]\(", r"\1(Generic[\2], "),
                (r"^(\s*class \w+)\[([^\]:]*)\]:", r"\1(Generic[\2]):"),
                (r"^(\s*def \w+)\[[^\]]*\]", r"\1"), (r"^type (\w+) = ", r"\1 = "),
            ):  # fmt: skip
                text = re.sub(pattern, told, text, flags=re.MULTILINE)
            data = text.encode()
        return compiled(self, data, path, **named)

    importlib.machinery.SourceFileLoader.source_to_code = older


def write_backbone(directory: Path, variant: Variant, older: bool) -> None:
    """Everything that would be fetched of Cosmos-Reason2: sizes, chat template, processors and a small tokenizer of Qwen's
    kind.

    Args:
        older: config.json as the published one has it, with names of transformers 4.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True)
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [" ".join(WORDS)] * 3 + ["user"]
    learned.train_from_iterator(text, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned, additional_special_tokens=list(SPECIAL), pad_token=SPECIAL[0])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL))))
    scaling = {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    rotary = (
        {"rope_theta": 1e6, "rope_scaling": scaling} if older else {"rope_parameters": {**scaling, "rope_theta": 1e6}}
    )
    seen = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            "size": {"shortest_edge": 1024, "longest_edge": 100_000}}  # fmt: skip
    files = {
        "config.json": {
            "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "tie_word_embeddings": True,
            "image_token_id": ids[IMAGE], "video_token_id": ids[VIDEO],
            "vision_start_token_id": ids[BEGIN], "vision_end_token_id": ids[END],
            "text_config": {
                "model_type": "qwen3_vl_text", "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": len(tokenizer),
                "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True, **rotary,
            },
            "vision_config": {
                "model_type": "qwen3_vl", "hidden_size": 16, "intermediate_size": 24, "depth": 3, "num_heads": 2,
                "hidden_act": "gelu_pytorch_tanh", "patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2,
                "num_position_embeddings": SIDE**2, "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0, 2],
            },
        },
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast", **seen},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **seen},
        "chat_template.json": {"chat_template": CHAT},
    }  # fmt: skip
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_config(variant: Variant) -> dict:
    """As Isaac-GR00T's config.json, with smaller numbers."""
    transformer = {"dropout": 0.2, "final_dropout": True, "num_attention_heads": 4, "positional_embeddings": None}
    return {
        "model_type": "Gr00tN1d7", "architectures": ["Gr00tN1d7"], "model_dtype": "float32", "dtype": "float32",
        "model_name": BACKBONE, "backbone_model_type": "qwen", "backbone_embedding_dim": WIDTH, "select_layer": 3,
        "use_flash_attention": False, "load_bf16": False, "reproject_vision": False,
        "max_state_dim": STATE_DIM, "max_action_dim": ACTION_DIM, "action_horizon": ROWS, "hidden_size": 20,
        "input_embedding_dim": 24, "state_history_length": 1, "add_pos_embed": True, "use_vlln": True, "max_seq_len": 16,
        "use_alternate_vl_dit": variant.alternates, "attend_text_every_n_blocks": 2,
        "num_inference_timesteps": variant.steps, "num_timestep_buckets": 1000, "max_num_embodiments": 32,
        "diffusion_model_cfg": {
            **transformer, "attention_head_dim": 6, "num_layers": 6, "output_dim": 20, "norm_type": "ada_norm",
            "interleave_self_attention": True,
        },
        "vl_self_attention_cfg": {**transformer, "attention_head_dim": 8, "num_layers": 2},
    }  # fmt: skip


def processor_config(variant: Variant) -> dict:
    """As Isaac-GR00T's processor_config.json."""
    actions = [
        {"rep": "RELATIVE" if key in variant.relative else "ABSOLUTE", "type": "NON_EEF", "format": "DEFAULT",
         "state_key": None}
        for key in variant.action_keys
    ]  # fmt: skip
    modalities = {
        "video": {"delta_indices": [0], "modality_keys": list(variant.cameras)},
        "state": {"delta_indices": [0], "modality_keys": list(variant.state_keys)},
        "action": {"delta_indices": list(range(variant.points)), "modality_keys": list(variant.action_keys),
                   "action_configs": actions},
    }  # fmt: skip
    kept = {variant.embodiment: modalities} if variant.state_keys else {}
    return {
        "processor_class": "Gr00tN1d7Processor",
        "processor_kwargs": {
            "modality_configs": kept, "use_percentiles": variant.percentiles, "clip_outliers": True, "max_action_horizon": ROWS,
            "use_relative_action": bool(variant.relative), "model_name": BACKBONE, "max_state_dim": STATE_DIM,
            "max_action_dim": ACTION_DIM, "formalize_language": True, **variant.pictures,
        },
    }  # fmt: skip


def bounds(variant: Variant, rng: np.random.Generator) -> dict:
    """The entry of one embodiment in statistics.json, the last dimension of the state constant."""

    def told(values: np.ndarray) -> dict:
        quantiles = {f"q{percent:02d}": np.quantile(values, percent / 100, axis=0).tolist() for percent in (1, 99)}
        return {"min": values.min(0).tolist(), "max": values.max(0).tolist(), "mean": values.mean(0).tolist(),
                "std": values.std(0).tolist(), **quantiles}  # fmt: skip

    entry: dict = {"state": {}, "action": {}, "relative_action": {}}
    for kind, keys in (("state", variant.state_keys), ("action", variant.action_keys)):
        for key, width in reversed(keys.items()):
            values = rng.normal(rng.normal(0, 0.5, width), rng.uniform(0.1, 0.8, width), (200, width))
            if kind == "state" and key == list(keys)[-1]:
                values[:, -1] = 0.25
            entry[kind][key] = told(values)
    for key in variant.relative:
        values = rng.normal(0, 0.05, (200, variant.points, variant.action_keys[key]))
        entry["relative_action"][key] = told(values * np.arange(1, 1 + variant.points)[:, None])
    return entry


@dataclass(frozen=True)
class Original:
    """A policy that is loaded from disk again, and what goes before and after it.

    Attributes:
        model: LeRobot's `GR00TN17`. prepare: (frames, state, task) -> what the model takes. order: of the cameras.
        finish: (1, ROWS, ACTION_DIM) -> (1, points, joints), absolute where LeRobot makes it so.
    """

    model: torch.nn.Module
    prepare: object
    finish: object
    order: tuple[str, ...]


def random_model(variant: Variant) -> torch.nn.Module:
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

    model = GR00TN17(GR00TN17Config(**model_config(variant)), load_backbone_weights=False).float()
    randomize_(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".W", "action_head.position_embedding.weight")):
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter.shape[-2] ** 0.5 if "W" in name else 1))
            if name.endswith("pos_embed.weight"):
                parameter.copy_(torch.randn_like(parameter))
            if name.endswith((".b", "norm.bias", "norm1.bias", "norm2.bias")):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            if name.endswith(NORMS) and parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return model.eval()


def write_base(directory: Path, variant: Variant, rng: np.random.Generator, shards: str) -> None:
    """As Isaac-GR00T leaves a policy."""
    random_model(variant).save_pretrained(directory, max_shard_size=shards)
    (directory / "generation_config.json").unlink(missing_ok=True)
    files = {"config.json": model_config(variant), "processor_config.json": processor_config(variant)}
    if variant.state_keys:
        files["statistics.json"] = {tag: bounds(variant, rng) for tag in ("libero_sim", variant.embodiment)}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def lerobot_config(variant: Variant, base: str):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_policy_config

    joints = {kind: sum(keys.values()) or variant.joints for kind, keys in (
        (STATE, variant.state_keys), (ACTION, variant.action_keys))}  # fmt: skip
    features = {STATE: PolicyFeature(FeatureType.STATE, (joints[STATE],))}
    for name, camera in variant.cameras.items():
        features[f"observation.images.{name}"] = PolicyFeature(FeatureType.VISUAL, (3, *camera.crop[2:]))
    return make_policy_config(
        "groot", input_features=features, output_features={ACTION: PolicyFeature(FeatureType.ACTION, (joints[ACTION],))},
        device="cpu", base_model_path=base, embodiment_tag=variant.embodiment, use_bf16=False, max_state_dim=STATE_DIM,
        max_action_dim=ACTION_DIM, chunk_size=variant.points, n_action_steps=variant.points,
    )  # fmt: skip


def as_lerobot(checkpoint: Path, variant: Variant, rng: np.random.Generator) -> Original:
    """config.json, model.safetensors and both processors, saved by LeRobot."""
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.policies.groot import processor_groot

    processor_groot.GROOT_N1_7_BACKBONE_MODEL = BACKBONE
    base = checkpoint / BASE
    write_base(base, variant, rng, "1GB")
    config, kind = lerobot_config(variant, BASE), get_policy_class("groot")
    kind(config).save_pretrained(checkpoint)
    for processor in make_pre_post_processors(config, dataset_stats=statistics(variant.joints, rng)):
        processor.save_pretrained(checkpoint)
    write_robot_facts(checkpoint / "vla_edge.json", variant.joints, False, variant.cameras)
    policy = kind.from_pretrained(checkpoint).eval()
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(checkpoint))
    for path in base.iterdir():
        if path.name != "config.json":
            path.unlink()
    # keys that a base model has decide on the order, and else the alphabet
    order = tuple(variant.cameras if variant.state_keys else sorted(variant.cameras))
    return running(policy, before, after, variant, order)


def as_isaac(checkpoint: Path, variant: Variant, rng: np.random.Generator) -> Original:
    """Shards with their index, config.json, processor_config.json, statistics.json and embodiment_id.json."""
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.policies.groot import processor_groot

    processor_groot.GROOT_N1_7_BACKBONE_MODEL = BACKBONE
    write_base(checkpoint, variant, rng, "300KB")
    (checkpoint / "embodiment_id.json").write_text(json.dumps({variant.embodiment: 7, "libero_sim": 2}) + "\n")
    names = [f"joint_{index}" for index in range(sum(variant.state_keys.values()))]
    write_robot_facts(
        checkpoint / "vla_edge.json", len(names), False, variant.cameras, embodiment_tag=variant.embodiment,
        state_names=names,
    )  # fmt: skip
    facts = json.loads((checkpoint / "vla_edge.json").read_text())
    begins = dict(zip(variant.state_keys, np.cumsum([0, *variant.state_keys.values()])))
    facts["joint_names"] = [names[begins[key] + i] for key, width in variant.action_keys.items() for i in range(width)]
    (checkpoint / "vla_edge.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    policy = get_policy_class("groot").from_pretrained("./", config=lerobot_config(variant, "./")).eval()
    before, after = make_pre_post_processors(policy.config)
    return running(policy, before, after, variant, tuple(variant.cameras))


def running(policy, before, after, variant: Variant, order: tuple[str, ...]) -> Original:
    from lerobot.policies.utils import prepare_observation_for_inference

    def prepare(frames: dict, state: np.ndarray, task: str) -> dict:
        shown = {f"observation.images.{name}": cropped(frames[name], c).copy() for name, c in variant.cameras.items()}
        return before(prepare_observation_for_inference({**shown, STATE: state}, torch.device("cpu"), task))

    def finish(raw: torch.Tensor) -> torch.Tensor:
        joints = policy.config.output_features[ACTION].shape[0]
        return after(raw[:, : variant.points, :joints])

    return Original(policy._groot_model, prepare, finish, order)


TAKEN = (
    "state", "embodiment_id", "input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids",
)  # fmt: skip


def pictures(batch: dict) -> list[np.ndarray]:
    """(1, 3, H, W) of each camera, out of rows of patches."""
    found, begin = [], 0
    for _, rows, columns in batch["image_grid_thw"].tolist():
        patches = batch["pixel_values"][begin : begin + rows * columns]
        begin += rows * columns
        shape = (rows // 2, columns // 2, 2, 2, 3, 2, PATCH, PATCH)
        moment = patches.reshape(shape)[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
        found.append(moment.reshape(1, 3, rows * PATCH, columns * PATCH).numpy())
    return found


@torch.no_grad()
def references(original: Original, variant: Variant, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`<index>.<name>` -> array, for one observation per task."""
    arrays = {"tasks": np.array(TASKS)}
    head, features, velocities = original.model.action_head, [], []
    head.vlln.register_forward_hook(lambda module, given, made: features.append(given[0]))
    head.action_decoder.register_forward_hook(lambda module, given, made: velocities.append(made[:, -ROWS:]))
    joints = sum(variant.state_keys.values()) or variant.joints
    drawn = torch.randn
    for index, task in enumerate(TASKS):
        frames = {name: picture(camera.height, camera.width, rng) for name, camera in variant.cameras.items()}
        state = rng.normal(0, 0.5, joints).astype(np.float32)
        noise = rng.standard_normal((1, ROWS, ACTION_DIM), dtype=np.float32)
        batch = original.prepare(frames, state, task)
        inputs = {name: value for name, value in batch.items() if name in TAKEN}
        velocities.clear(), features.clear()
        torch.randn = lambda *given, noise=noise, **named: torch.from_numpy(noise.copy())
        try:
            raw = original.model.get_action(inputs)["action_pred"]
        finally:
            torch.randn = drawn
        assert batch["attention_mask"].all()  # of one observation nothing is padded
        found = {
            "positions": state, "noise": noise, "tokens": batch["input_ids"], "state": batch["state"][:, 0],
            "features": features[0], "velocity": -velocities[0], "actions": original.finish(raw.clone()),
            **{f"image.{name}": image for name, image in zip(original.order, pictures(batch))},
            **{f"frame.{name}": frame for name, frame in frames.items()},
        }  # fmt: skip
        arrays |= {f"{index}.{name}": np.asarray(value) for name, value in found.items()}
    return arrays


if __name__ == "__main__":
    main()
