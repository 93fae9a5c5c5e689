"""Write a random pi0 or pi0.5 as LeRobot saves it, and what LeRobot makes of a few observations with it.

    python tools/parity/generate_pi.py --variant pi0 --output test/parity/pi/pi0

Nothing of vla_edge is imported. The classes are LeRobot's and transformers' own; only the sizes they are made with,
which LeRobot has no option for, are set here.
"""

from __future__ import annotations

import os
import shutil
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

# a hub cache of our own, so that the tokenizer LeRobot names is found offline
os.environ["HF_HUB_OFFLINE"] = "1"
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
from safetensors import safe_open  # noqa: E402

TOKENIZER = "google/paligemma-3b-pt-224"
VOCABULARY = 320


@dataclass(frozen=True)
class Variant:
    """Shapes and options of one reference policy."""

    family: str
    cameras: dict[str, Camera]
    state: str
    action: str
    joints: int = 5
    max_dim: int = 8
    image_size: int = 16
    patch_size: int = 4
    chunk_size: int = 6
    num_steps: int = 4
    tokenizer_max_length: int = 14
    text: dict = field(default_factory=lambda: {"width": 24, "mlp_dim": 40, "head_dim": 8})
    expert: dict = field(default_factory=lambda: {"width": 16, "mlp_dim": 28, "head_dim": 8})
    layers: int = 3
    empty_cameras: int = 0


VARIANTS = {
    # the published pi0: mean and standard deviation; one camera that is padded on both sides
    "pi0": Variant("pi0", {"head": Camera(40, 60, (2, 5, 36, 52))}, "MEAN_STD", "MEAN_STD"),
    # two cameras beside one that is always absent; minimum and maximum, and values as they are
    "pi0_cameras": Variant(
        "pi0", {"head": Camera(16, 16, (0, 0, 16, 16)), "wrist": Camera(50, 33, (3, 1, 47, 31))}, "MIN_MAX", "IDENTITY",
        empty_cameras=1,
    ),
    # the published pi0.5: quantiles, the state in words
    "pi05": Variant(
        "pi05", {"head": Camera(40, 60, (2, 5, 36, 52))}, "QUANTILES", "QUANTILES", max_dim=32, tokenizer_max_length=64
    ),
}  # fmt: skip


def main() -> None:
    arguments = asked(__doc__, VARIANTS)
    variant, output = VARIANTS[arguments.variant], arguments.output
    checkpoint = output / "checkpoint"
    cache = output / "cache"
    os.environ["HF_HOME"] = str(cache)  # before transformers is imported, which reads it once
    write_tokenizer(cache)
    set_sizes(variant)
    write_policy(checkpoint, variant, np.random.default_rng(arguments.seed))
    write_robot_facts(checkpoint / "vla_edge.json", variant.joints, True, variant.cameras)
    np.savez_compressed(output / "reference.npz", **references(checkpoint, variant, np.random.default_rng(1)))
    shutil.copy(next(cache.rglob("tokenizer.json")), checkpoint / "tokenizer.json")
    shutil.rmtree(cache)
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>9} {path.relative_to(output)}")


def write_tokenizer(home: Path) -> None:
    """A word-level stand-in for PaliGemma's, where the hub's cache would have it: it begins with <bos>, knows the line
    break and the numbers of states."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["task", "state", "action", ":", ",", ";", "newline", "-", *map(str, range(257)), *WORDS]
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<bos>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("\n", " newline "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    place = home / "hub" / f"models--{TOKENIZER.replace('/', '--')}"
    snapshot = place / "snapshots" / "0"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>"
    ).save_pretrained(snapshot)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text("0")


def set_sizes(variant: Variant) -> None:
    """Smaller numbers where LeRobot has those of the 3B original."""
    import importlib

    module = importlib.import_module(f"lerobot.policies.{variant.family}.modeling_{variant.family}")
    shapes = {"gemma_2b": variant.text, "gemma_300m": variant.expert}
    module.get_gemma_config = lambda name: module.GemmaConfig(
        depth=variant.layers, num_heads=8, num_kv_heads=1, **shapes[name]
    )
    smaller_networks(module, variant)


def smaller_networks(module, variant: Variant) -> None:
    """In a module that makes PaliGemma and its expert, which LeRobot's and openpi's do alike."""
    whole, expert = module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM

    def paligemma(config):
        config._vocab_size = config.image_token_index = config.text_config.vocab_size = VOCABULARY
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 32, 44, 2
        vision.num_attention_heads, vision.patch_size = 16, variant.patch_size
        config.projection_dim = vision.projection_dim = variant.text["width"]
        return whole(config=config)

    def gemma(config):
        config.vocab_size = 8
        return expert(config=config)

    module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM = paligemma, gemma


def write_policy(directory: Path, variant: Variant, rng: np.random.Generator) -> None:
    """config.json, model.safetensors and both processors, saved by LeRobot."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    features = {STATE: PolicyFeature(FeatureType.STATE, (variant.joints,))}
    for name, camera in variant.cameras.items():
        features[f"observation.images.{name}"] = PolicyFeature(FeatureType.VISUAL, (3, *camera.crop[2:]))
    config = make_policy_config(
        variant.family,
        input_features=features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (variant.joints,))},
        normalization_mapping={
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode(variant.state),
            "ACTION": NormalizationMode(variant.action),
        },
        device="cpu",
        dtype="float32",
        chunk_size=variant.chunk_size,
        n_action_steps=variant.chunk_size,
        max_state_dim=variant.max_dim,
        max_action_dim=variant.max_dim,
        image_resolution=(variant.image_size, variant.image_size),
        num_inference_steps=variant.num_steps,
        tokenizer_max_length=variant.tokenizer_max_length,
        empty_cameras=variant.empty_cameras,
    )
    policy = get_policy_class(variant.family)(config)
    randomize_(policy, norm=0.0)  # Gemma's norms multiply by one more than their weight
    policy.save_pretrained(directory)
    for processor in make_pre_post_processors(config, dataset_stats=statistics(variant.joints, rng)):
        processor.save_pretrained(directory)


@torch.no_grad()
def references(checkpoint: Path, variant: Variant, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`<index>.<name>` -> array, for one observation per task; the policy is loaded from disk again."""
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.policies.utils import prepare_observation_for_inference

    # not strictly: the table of words and the language model's head are one tensor, saved under one of two names
    policy = get_policy_class(variant.family).from_pretrained(checkpoint, strict=False).eval()
    with safe_open(checkpoint / "model.safetensors", "pt") as saved:
        loaded = policy.state_dict()
        assert all(torch.equal(saved.get_tensor(name), loaded[name]) for name in saved.keys())
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(checkpoint))
    velocities: list[torch.Tensor] = []
    denoise = policy.model.denoise_step
    policy.model.denoise_step = lambda *given, **named: velocities.append(denoise(*given, **named)) or velocities[-1]
    arrays = {"tasks": np.array(TASKS)}
    for index, task in enumerate(TASKS):
        frames = {name: picture(camera.height, camera.width, rng) for name, camera in variant.cameras.items()}
        state = rng.normal(0, 0.5, variant.joints).astype(np.float32)
        state[-1] = 0.25  # as its statistics: LeRobot divides by 1e-8 there
        noise = rng.standard_normal((1, variant.chunk_size, variant.max_dim), dtype=np.float32)
        shown = {f"observation.images.{name}": cropped(frames[name], c).copy() for name, c in variant.cameras.items()}
        batch = before(prepare_observation_for_inference({**shown, STATE: state}, torch.device("cpu"), task))
        velocities.clear()
        raw = policy.predict_action_chunk(batch, noise=torch.from_numpy(noise.copy()))
        images, _ = policy._preprocess_images(batch)
        found = {
            "positions": state,
            "noise": noise,
            "tokens": batch["observation.language.tokens"],
            "mask": batch["observation.language.attention_mask"],
            "state": batch[STATE],
            "velocity": velocities[0],
            "actions": after(raw.clone()),
            **{f"image.{name}": image for name, image in zip(variant.cameras, images)},
            **{f"frame.{name}": frame for name, frame in frames.items()},
        }
        arrays |= {f"{index}.{name}": np.asarray(value) for name, value in found.items()}
    return arrays


if __name__ == "__main__":
    main()
