"""Write a random GR00T N1.5 as LeRobot or Isaac-GR00T saves it, and what LeRobot's port makes of a few observations.

    python tools/parity/generate_groot.py --variant lerobot --output test/parity/groot/lerobot

Nothing of vla_edge is imported. The networks, the backbone's processor and the steps that use it are LeRobot's,
transformers' and diffusers' own; SigLIP's attention, which LeRobot asks flash-attn for, is transformers' eager one. Of
Isaac-GR00T, which needs CUDA to be installed, its transforms of pictures, states and actions are written here once more,
with torchvision (gr00t/data/transform).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
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

ASSETS = "lerobot/eagle2hg-processor-groot-n1p5"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
# what Eagle's gives for one user's pictures and words, in other words
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% set pictures = namespace(count=0) %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{% set pictures.count = pictures.count + 1 %}<image-{{ pictures.count }}>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE, PATCH, SHARES = 16, 2, 0.95
DTYPE = torch.float32


@dataclass(frozen=True)
class Variant:
    """Shapes and options of one reference policy.

    Attributes:
        state_keys, action_keys: Isaac-GR00T's modalities -> joints; LeRobot has none.
    """

    cameras: dict[str, Camera]
    embodiment: str
    shuffle: bool
    connector_layers: int
    joints: int = 5
    state_keys: dict[str, int] = field(default_factory=dict)
    action_keys: dict[str, int] = field(default_factory=dict)
    steps: int = 4
    horizon: int = 6

    @property
    def tokens(self) -> int:
        """Of one picture."""
        return (SIZE // PATCH // (2 if self.shuffle else 1)) ** 2


VARIANTS = {
    # the published backbone: one linear layer, every patch a token; two cameras, which LeRobot takes in alphabetical order
    "lerobot": Variant(
        {"wrist": Camera(36, 52, (0, 0, 36, 52)), "head": Camera(40, 60, (2, 5, 36, 52))}, "gr1", False, 1
    ),
    # pixel shuffle and two layers behind it, another embodiment, shards, states of other joints than the actions'
    "isaac": Variant(
        {"head": Camera(40, 60, (1, 2, 38, 57))}, "new_embodiment", True, 2,
        state_keys={"left_arm": 3, "waist": 4}, action_keys={"left_arm": 3, "hand": 2}, steps=5,
    ),
}  # fmt: skip


def main() -> None:
    arguments = asked(__doc__, VARIANTS)
    variant, output = VARIANTS[arguments.variant], arguments.output
    checkpoint, cache = output / "checkpoint", output / "cache"
    shutil.rmtree(output, ignore_errors=True)
    # before they are imported, which read it once
    os.environ["HF_HOME"], os.environ["HF_LEROBOT_HOME"] = str(cache), str(cache / "lerobot")
    checkpoint.mkdir(parents=True)
    write_backbone(cache / "lerobot" / ASSETS, variant)
    attend_eagerly()
    rng = np.random.default_rng(arguments.seed)
    made = (as_lerobot if arguments.variant == "lerobot" else as_isaac)(checkpoint, variant, rng)
    np.savez_compressed(output / "reference.npz", **references(made, variant, np.random.default_rng(1)))
    keep = ("config.json", "tokenizer.json", "chat_template.json")
    (checkpoint / "backbone").mkdir()
    for name in keep:
        shutil.copy(cache / "lerobot" / ASSETS / name, checkpoint / "backbone" / name)
    shutil.rmtree(cache)
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>9} {path.relative_to(output)}")


def write_backbone(directory: Path, variant: Variant) -> None:
    """Everything LeRobot would fetch of Eagle 2.5: sizes, chat template, processor and a small tokenizer of Qwen's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    directory.mkdir(parents=True)
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [" ".join(WORDS)] * 3 + ["system You are a helpful assistant. user image ['']"]
    learned.train_from_iterator(text, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False))
    learned.model.save(str(directory))
    tokenizer = Qwen2TokenizerFast(str(directory / "vocab.json"), str(directory / "merges.txt"), unk_token=None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.pad_token = SPECIAL[0]
    tokenizer.save_pretrained(directory)
    size = {"height": SIZE, "width": SIZE}
    remote = {"AutoImageProcessor": "image_processing_eagle2_5_vl_fast.Eagle25VLImageProcessorFast",
              "AutoProcessor": "processing_eagle2_5_vl.Eagle25VLProcessor"}  # fmt: skip
    files = {
        "config.json": eagle_config(variant, len(tokenizer), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")),
        "generation_config.json": {},
        "added_tokens.json": tokenizer.get_added_vocab(),
        "chat_template.json": {"chat_template": CHAT},
        "processor_config.json": {"processor_class": "Eagle25VLProcessor", "tokens_per_tile": variant.tokens,
                                  "auto_map": {"AutoProcessor": remote["AutoProcessor"]}},
        "preprocessor_config.json": {
            "auto_map": remote, "image_processor_type": "Eagle25VLImageProcessorFast", "size": size, "resample": 3,
            "processor_class": "Eagle25VLProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": False,
            "do_rescale": True, "do_normalize": True, "do_pad": False, "use_thumbnail": True,
        },
    }  # fmt: skip
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def eagle_config(variant: Variant, vocabulary: int, image_token: int) -> dict:
    """Of the backbone; its language model has more layers than are kept."""
    remote = {"AutoConfig": "configuration_eagle2_5_vl.Eagle25VLConfig",
              "AutoModel": "modeling_eagle2_5_vl.Eagle25VLForConditionalGeneration"}  # fmt: skip
    return {
        "model_type": "eagle_2_5_vl", "architectures": ["Eagle25VLForConditionalGeneration"], "auto_map": remote,
        "select_layer": -1, "force_image_size": SIZE, "downsample_ratio": 0.5, "image_token_index": image_token,
        "use_pixel_shuffle": variant.shuffle, "mlp_connector_layers": variant.connector_layers,
        "_attn_implementation": "eager",
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH, "layer_norm_eps": 1e-6,
        },
        "text_config": {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "vocab_size": vocabulary, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
            "_attn_implementation": "eager",
        },
    }  # fmt: skip


def model_config(variant: Variant) -> dict:
    """As Isaac-GR00T's config.json, with smaller numbers."""
    transformer = {"dropout": 0.2, "final_dropout": True, "num_attention_heads": 4, "positional_embeddings": None}
    return {
        "model_type": "gr00t_n1_5", "architectures": ["GR00T_N1_5"], "compute_dtype": "float32",
        "action_dim": 8, "action_horizon": variant.horizon, "hidden_size": 32,
        "backbone_cfg": {"select_layer": 2, "project_to_dim": None, "reproject_vision": False, "tune_llm": False,
                         "tune_visual": True, "use_flash_attention": False, "load_bf16": False},
        "action_head_cfg": {
            "action_dim": 8, "action_horizon": variant.horizon, "add_pos_embed": True, "backbone_embedding_dim": 32,
            "hidden_size": 20, "input_embedding_dim": 24, "max_action_dim": 8, "max_state_dim": 12, "max_seq_len": 16,
            "model_dtype": "float32", "noise_beta_alpha": 1.5, "noise_beta_beta": 1.0, "noise_s": 0.999,
            "num_inference_timesteps": variant.steps, "num_target_vision_tokens": 3, "num_timestep_buckets": 1000,
            "max_num_embodiments": 32, "tune_diffusion_model": True, "tune_projector": True, "use_vlln": True,
            "diffusion_model_cfg": {
                **transformer, "attention_head_dim": 6, "num_layers": 4, "output_dim": 20, "cross_attention_dim": 32,
                "interleave_self_attention": True, "norm_type": "ada_norm",
            },
            "vl_self_attention_cfg": {**transformer, "attention_head_dim": 8, "num_layers": 2},
        },
    }  # fmt: skip


def attend_eagerly() -> None:
    """SigLIP by transformers' eager attention, in the place of flash-attn's, which is the same but for rounding."""
    from transformers.models.siglip import modeling_siglip

    class Eager(modeling_siglip.SiglipVisionModel):
        def __init__(self, config):
            config._attn_implementation = "eager"
            super().__init__(config)

    modeling_siglip.SiglipVisionModel = Eager


@dataclass(frozen=True)
class Original:
    """A policy that is loaded from disk again, and what goes before and after it.

    Attributes:
        model: LeRobot's `GR00TN15`. prepare: (frames, state, task) -> what the model takes.
        finish: (1, T, action_dim) -> (1, T, joints).
    """

    model: torch.nn.Module
    prepare: object
    finish: object


def random_model(variant: Variant) -> torch.nn.Module:
    from lerobot.policies.groot.groot_n1 import GR00TN15, GR00TN15Config

    model = GR00TN15(GR00TN15Config(**model_config(variant)), local_model_path="")
    randomize_(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".W", "future_tokens.weight", "action_head.position_embedding.weight")):
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter.shape[-2] ** 0.5 if "W" in name else 1))
            if name.endswith((".b", "norm.bias")):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            if name.endswith(("norm1.weight", "norm3.weight", "vlln.weight", "mlp1.0.weight")) and parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return model.eval()


def as_lerobot(checkpoint: Path, variant: Variant, rng: np.random.Generator) -> Original:
    """config.json, model.safetensors and both processors, saved by LeRobot."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
    from lerobot.policies.utils import prepare_observation_for_inference

    base = checkpoint / "base"
    random_model(variant).save_pretrained(base)
    (base / "config.json").write_text(json.dumps(model_config(variant), indent=2) + "\n", encoding="utf-8")
    os.chdir(checkpoint)  # to which LeRobot takes the base model's place as relative
    features = {STATE: PolicyFeature(FeatureType.STATE, (variant.joints,))}
    for name, camera in variant.cameras.items():
        features[f"observation.images.{name}"] = PolicyFeature(FeatureType.VISUAL, (3, *camera.crop[2:]))
    config = make_policy_config(
        "groot", input_features=features, output_features={ACTION: PolicyFeature(FeatureType.ACTION, (variant.joints,))},
        device="cpu", base_model_path="./base", tokenizer_assets_repo=ASSETS, embodiment_tag=variant.embodiment,
        use_bf16=False, max_state_dim=12, max_action_dim=8, chunk_size=variant.horizon, n_action_steps=variant.horizon,
    )  # fmt: skip
    kind = get_policy_class("groot")
    kind(config).save_pretrained(checkpoint)
    for processor in make_pre_post_processors(config, dataset_stats=statistics(variant.joints, rng)):
        processor.save_pretrained(checkpoint)
    write_robot_facts(checkpoint / "vla_edge.json", variant.joints, True, variant.cameras)
    policy = kind.from_pretrained(checkpoint).eval()
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(checkpoint))
    os.chdir(checkpoint.parent)
    for path in base.glob("*.safetensors*"):
        path.unlink()

    def prepare(frames: dict, state: np.ndarray, task: str) -> dict:
        shown = {f"observation.images.{name}": cropped(frames[name], c).copy() for name, c in variant.cameras.items()}
        return before(prepare_observation_for_inference({**shown, STATE: state}, torch.device("cpu"), task))

    def finish(raw: torch.Tensor) -> torch.Tensor:  # an action at a time, as select_action hands them out
        return torch.stack([after(raw[:, i, : variant.joints]) for i in range(raw.shape[1])], dim=1)

    return Original(policy._groot_model, prepare, finish)


def as_isaac(checkpoint: Path, variant: Variant, rng: np.random.Generator) -> Original:
    """config.json, shards with their index and experiment_cfg/metadata.json."""
    from lerobot.policies.groot.groot_n1 import GR00TN15
    from lerobot.policies.groot.processor_groot import GrootEagleCollateStep, GrootEagleEncodeStep
    from lerobot.processor.core import TransitionKey
    from torchvision.transforms import v2

    random_model(variant).save_pretrained(checkpoint, max_shard_size="300KB")
    (checkpoint / "config.json").write_text(json.dumps(model_config(variant), indent=2) + "\n", encoding="utf-8")
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    metadata = {tag: modalities(variant, rng) for tag in ("gr1", variant.embodiment)}
    (checkpoint / "experiment_cfg").mkdir()
    (checkpoint / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    sizes = {"state": sum(variant.state_keys.values()), "action": sum(variant.action_keys.values())}
    write_robot_facts(
        checkpoint / "vla_edge.json", sizes["action"], False, variant.cameras, embodiment_tag=variant.embodiment,
        state_keys=list(variant.state_keys), action_keys=list(variant.action_keys),
        state_names=[f"joint_{index}" for index in range(sizes["state"])],
    )  # fmt: skip
    model = GR00TN15.from_pretrained(str(checkpoint)).float().eval()
    bounds = {kind: joined(metadata[variant.embodiment], kind, keys) for kind, keys in (
        ("state", variant.state_keys), ("action", variant.action_keys))}  # fmt: skip
    resize = v2.Resize((SIZE, SIZE), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    encode, collate = GrootEagleEncodeStep(ASSETS), GrootEagleCollateStep(ASSETS)

    def prepare(frames: dict, state: np.ndarray, task: str) -> dict:
        views = []
        for name, camera in variant.cameras.items():
            centre = v2.CenterCrop((int(camera.height * SHARES), int(camera.width * SHARES)))
            view = centre(v2.functional.to_dtype(torch.from_numpy(frames[name]).permute(2, 0, 1), DTYPE, scale=True))
            views.append((resize(view) * 255).to(torch.uint8).numpy())
        low, high = bounds["state"]
        moved = np.where(high == low, 0, 2 * (state - low) / np.where(high == low, 1, high - low) - 1)
        moved = np.pad(moved, (0, model_config(variant)["action_head_cfg"]["max_state_dim"] - len(moved)))
        transition = {
            TransitionKey.OBSERVATION: {"video": np.stack(views)[None, None]},
            TransitionKey.COMPLEMENTARY_DATA: {"language": task},
        }
        found = collate(encode(transition))[TransitionKey.COMPLEMENTARY_DATA]
        found["state"] = torch.tensor(moved, dtype=DTYPE)[None, None]
        found["embodiment_id"] = torch.tensor([{"new_embodiment": 31}[variant.embodiment]])
        return found

    def finish(raw: torch.Tensor) -> torch.Tensor:
        low, high = (torch.tensor(side) for side in bounds["action"])
        return (raw[..., : len(low)] + 1) / 2 * (high - low) + low

    return Original(model, prepare, finish)


def modalities(variant: Variant, rng: np.random.Generator) -> dict:
    """The entry of one embodiment in metadata.json, the last dimension of the state constant; keys stand in another order
    there than the policy reads them in."""
    entry: dict = {"statistics": {}, "modalities": {"video": {}}}
    for kind, keys in (("state", variant.state_keys), ("action", variant.action_keys)):
        entry["statistics"][kind], entry["modalities"][kind] = {}, {}
        for key, width in reversed(keys.items()):
            values = rng.normal(rng.normal(0, 0.5, width), rng.uniform(0.1, 0.8, width), (200, width))
            if kind == "state" and key == list(keys)[-1]:
                values[:, -1] = 0.25
            entry["statistics"][kind][key] = {
                "min": values.min(0).tolist(), "max": values.max(0).tolist(), "mean": values.mean(0).tolist(),
                "std": values.std(0).tolist(),
            }  # fmt: skip
            entry["modalities"][kind][key] = {
                "absolute": True, "rotation_type": None, "shape": [width], "continuous": True
            }  # fmt: skip
    return entry


def joined(entry: dict, kind: str, keys: dict[str, int]) -> list[np.ndarray]:
    """Smallest and largest values, in the order the policy reads keys."""
    return [np.concatenate([entry["statistics"][kind][key][side] for key in keys]) for side in ("min", "max")]


@torch.no_grad()
def references(original: Original, variant: Variant, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`<index>.<name>` -> array, for one observation per task."""
    arrays = {"tasks": np.array(TASKS)}
    head, features, velocities = original.model.action_head, [], []
    head.vlln.register_forward_hook(lambda module, given, made: features.append(given[0]))
    head.action_decoder.register_forward_hook(lambda module, given, made: velocities.append(made[:, -variant.horizon :]))
    joints = sum(variant.state_keys.values()) or variant.joints
    drawn = torch.randn
    for index, task in enumerate(TASKS):
        frames = {name: picture(camera.height, camera.width, rng) for name, camera in variant.cameras.items()}
        state = rng.normal(0, 0.5, joints).astype(np.float32)
        noise = rng.standard_normal((1, variant.horizon, head.action_dim), dtype=np.float32)
        batch = original.prepare(frames, state, task)
        inputs = {name: value for name, value in batch.items() if name in ("state", "embodiment_id") or "eagle_" in name}
        velocities.clear(), features.clear()
        torch.randn = lambda *given, noise=noise, **named: torch.from_numpy(noise.copy())
        try:
            raw = original.model.get_action(inputs)["action_pred"]
        finally:
            torch.randn = drawn
        assert batch["eagle_attention_mask"].all()  # of one observation nothing is padded
        order = sorted(variant.cameras) if not variant.state_keys else list(variant.cameras)
        found = {
            "positions": state, "noise": noise, "tokens": batch["eagle_input_ids"], "state": batch["state"][:, 0],
            "features": features[0], "velocity": -velocities[0], "actions": original.finish(raw.clone()),
            **{f"image.{name}": image[None] for name, image in zip(order, batch["eagle_pixel_values"])},
            **{f"frame.{name}": frame for name, frame in frames.items()},
        }  # fmt: skip
        arrays |= {f"{index}.{name}": np.asarray(value) for name, value in found.items()}
    return arrays


if __name__ == "__main__":
    main()
