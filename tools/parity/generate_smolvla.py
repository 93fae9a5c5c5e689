"""Write a random SmolVLA as LeRobot saves it, and what LeRobot makes of a few observations with it.

    python tools/parity/generate_smolvla.py --variant interleaved --output test/parity/smolvla/interleaved

The output holds `checkpoint/` (LeRobot's `pretrained_model/` layout, the backbone's files and vla_edge.json beside it)
and `reference.npz`: raw inputs, LeRobot's intermediate tensors and its actions. Nothing of vla_edge is imported: the
reference shares no code with what it judges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lerobot_offline import LeRobotSmolVLA, SmolVLAPolicy, inside, make_pre_post_processors
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)
from random_policies import (
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
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

TOKENS = ("[PAD]", "[UNK]", "<fake_token_around_image>", "<global-img>", "<image>")


@dataclass(frozen=True)
class Variant:
    """Shapes and options of one reference policy; defaults are the smallest that leave no two widths alike."""

    cameras: dict[str, Camera]
    joints: int = 5
    relative_actions: bool = True
    image_size: int = 24
    backbone_image_size: int | None = None  # LeRobot may resize to less than the backbone's table of positions covers
    patch_size: int = 4
    scale_factor: int = 2
    vision: dict = field(
        default_factory=lambda: {
            "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
        }
    )  # fmt: skip
    text: dict = field(
        default_factory=lambda: {
            "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
            "num_key_value_heads": 3, "head_dim": 8, "rms_norm_eps": 1e-5,
        }
    )  # fmt: skip
    tie_word_embeddings: bool = False
    pretrained_backbone: bool = False
    chunk_size: int = 6
    max_dim: int = 8
    tokenizer_max_length: int = 14
    num_steps: int = 5
    state: str = "MEAN_STD"
    action: str = "MEAN_STD"
    options: dict = field(default_factory=dict)  # more of LeRobot's SmolVLAConfig


VARIANTS = {
    # the shape of every SmolVLA in the wild; one camera whose resize is exact sampling
    "interleaved": Variant({"head": Camera(72, 96, (0, 12, 72, 72))}),
    # fewer expert layers than text layers, of which the backbone has more than are used; two cameras of other aspects;
    # image markers; a prefix padded beyond its content
    "half_expert": Variant(
        {"head": Camera(48, 64, (0, 0, 48, 64)), "wrist": Camera(50, 33, (3, 1, 47, 31))},
        relative_actions=False,
        text={
            "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 6,
            "num_key_value_heads": 3, "head_dim": 8,
        },
        tie_word_embeddings=True,
        state="MIN_MAX",
        action="QUANTILES",
        options={
            "num_vlm_layers": 4, "num_expert_layers": 2, "self_attn_every_n_layers": 4,
            "add_image_special_tokens": True, "prefix_length": 64, "pad_language_to": "max_length",
        },
    ),
    # no cross-attention; a backbone whose table of positions is finer than the image; values not scaled
    "self_attention": Variant(
        {"head": Camera(30, 40, (3, 4, 24, 24))},
        backbone_image_size=40,
        state="IDENTITY",
        action="QUANTILE10",
        options={"attention_mode": "self_attn", "expert_width_multiplier": 0.5, "num_steps": 3},
    ),
    # a policy on top of a pretrained backbone, as the 450M original: LeRobot then runs most of it in bfloat16
    "bfloat16": Variant({"head": Camera(34, 40, (1, 4, 32, 32))}, image_size=32, pretrained_backbone=True),
}  # fmt: skip


def main() -> None:
    arguments = asked(__doc__, VARIANTS, threads=2)
    variant, output = VARIANTS[arguments.variant], arguments.output
    checkpoint = output / "checkpoint"
    write_backbone(checkpoint / "backbone", variant)
    write_robot_facts(checkpoint / "vla_edge.json", variant.joints, variant.relative_actions, variant.cameras)
    write_policy(checkpoint, variant, np.random.default_rng(arguments.seed))
    # from disk again: the reference is what the files say, not what was in memory
    np.savez_compressed(
        output / "reference.npz", **references(LeRobotSmolVLA(checkpoint), variant, np.random.default_rng(1))
    )
    (checkpoint / "backbone" / "model.safetensors").unlink(missing_ok=True)  # its weights are in the policy's too
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>9} {path.relative_to(output)}")


def write_backbone(directory: Path, variant: Variant) -> None:
    """The SmolVLM's config.json, tokenizer and image processor, each as transformers saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate((*TOKENS, *WORDS))}
    vision = SmolVLMVisionConfig(
        image_size=variant.backbone_image_size or variant.image_size, patch_size=variant.patch_size, **variant.vision
    )
    SmolVLMConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, **variant.text).to_dict(),
        scale_factor=variant.scale_factor,
        image_token_id=vocabulary["<image>"],
        pad_token_id=0,
        tie_word_embeddings=variant.tie_word_embeddings,
    ).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=variant.tokenizer_max_length,
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
        },
    ).save_pretrained(directory)
    # LeRobot takes the tokenizer out of an AutoProcessor, which wants this too; no image passes through it
    SmolVLMImageProcessor().save_pretrained(directory)


def write_policy(directory: Path, variant: Variant, rng: np.random.Generator) -> None:
    """config.json, model.safetensors and both processors, saved by LeRobot."""
    features = {STATE: PolicyFeature(FeatureType.STATE, (variant.joints,))}
    for name, camera in variant.cameras.items():
        features[f"observation.images.{name}"] = PolicyFeature(FeatureType.VISUAL, (3, *camera.crop[2:]))
    options = {"num_vlm_layers": variant.text["num_hidden_layers"], "num_steps": variant.num_steps, **variant.options}
    if variant.pretrained_backbone:
        backbone = directory / "backbone"
        SmolVLMForConditionalGeneration(SmolVLMConfig.from_pretrained(backbone)).save_pretrained(backbone)
    config = SmolVLAConfig(
        input_features=features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (variant.joints,))},
        normalization_mapping={
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode(variant.state),
            "ACTION": NormalizationMode(variant.action),
        },
        device="cpu",
        chunk_size=variant.chunk_size,
        n_action_steps=variant.chunk_size,
        max_state_dim=variant.max_dim,
        max_action_dim=variant.max_dim,
        resize_imgs_with_padding=(variant.image_size, variant.image_size),
        tokenizer_max_length=variant.tokenizer_max_length,
        vlm_model_name="backbone",
        load_vlm_weights=variant.pretrained_backbone,
        freeze_vision_encoder=False,
        train_expert_only=False,
        **options,
    )
    with inside(directory):
        policy = SmolVLAPolicy(config)
        randomize_(policy)
        policy.save_pretrained(".")
        for processor in make_pre_post_processors(config, dataset_stats=statistics(variant.joints, rng)):
            processor.save_pretrained(".")


def references(reference: LeRobotSmolVLA, variant: Variant, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`<index>.<name>` -> array, for one observation per task."""
    arrays = {"tasks": np.array(TASKS)}
    for index, task in enumerate(TASKS):
        frames = {name: picture(camera.height, camera.width, rng) for name, camera in variant.cameras.items()}
        images = {f"observation.images.{name}": cropped(frames[name], c) for name, c in variant.cameras.items()}
        state = rng.normal(0, 0.5, variant.joints).astype(np.float32)
        state[-1] = 0.25  # as its statistics: LeRobot divides by 1e-8 there
        noise = rng.standard_normal((1, variant.chunk_size, variant.max_dim), dtype=np.float32)
        prediction = reference.predict(images, state, task, noise)
        arrays[f"{index}.positions"], arrays[f"{index}.noise"] = state, noise
        for name, image in zip(variant.cameras, prediction.images, strict=True):
            arrays[f"{index}.frame.{name}"] = frames[name]
            arrays[f"{index}.image.{name}"] = image
        for name in ("tokens", "mask", "state", "prefix", "velocity", "raw", "actions"):
            arrays[f"{index}.{name}"] = getattr(prediction, name)
    return arrays


if __name__ == "__main__":
    main()
