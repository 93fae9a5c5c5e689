"""Write a policy as a checkpoint directory in LeRobot's layout, complete enough to be loaded offline by LeRobot too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vla_edge.files import whole_directory
from vla_edge.policy.checkpoint import ROBOT_FILE, WEIGHTS_FILE
from vla_edge.policy.checkpoint_files import CheckpointError
from vla_edge.policy.checkpoint_processors import NEW_LINE, NORMALIZER, POSTPROCESSOR, PREPROCESSOR, UNNORMALIZER
from vla_edge.policy.smolvla_shapes import expert_hidden
from vla_edge.policy.spec import ACTION, STATE, NormalizationMode, PolicySpec

BACKBONE = "backbone"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "<fake_token_around_image>", "<global-img>", "<image>")


def write_checkpoint(directory: str | Path, policy, spec: PolicySpec, words: Iterable[str] | Path) -> Path:
    """Write `policy` (a SmolVLA) to `directory`, replacing it as a whole: there is never half a checkpoint.

    Args:
        words: vocabulary of the word-level tokenizer, in the order of the embedding's rows after `SPECIAL_TOKENS`; or
            the backbone directory of another checkpoint, whose tokenizer is taken as it is.
    """
    from safetensors.torch import save_file

    from vla_edge.policy.smolvla_names import to_lerobot

    directory = Path(directory)
    with whole_directory(directory, CheckpointError) as temporary:
        save_file(to_lerobot(policy), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / BACKBONE).mkdir()
        _write_json(temporary / "config.json", lerobot_config(policy.config, spec))
        _write_json(temporary / BACKBONE / "config.json", backbone_config(policy.config))
        _write_json(temporary / ROBOT_FILE, _robot_facts(policy.config, spec))
        # LeRobot takes the tokenizer out of an AutoProcessor, which wants this file; no image passes through it
        image_processor = {"image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor"}
        _write_json(temporary / BACKBONE / "preprocessor_config.json", image_processor)
        if isinstance(words, Path):
            for file in sorted(words.iterdir()):
                if file.is_file() and not (temporary / BACKBONE / file.name).exists():
                    shutil.copyfile(file, temporary / BACKBONE / file.name)
        else:
            write_tokenizer(temporary / BACKBONE, words, policy.config.language_length)
        _write_processors(temporary, spec)
        for path in temporary.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors keeps them to their owner
    return directory


def write_tokenizer(directory: Path, words: Iterable[str], max_length: int) -> None:
    """A lower-casing word-level tokenizer.json, and beside it what transformers' AutoTokenizer looks for."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            # SmolVLA asks the tokenizer for these by name
            "extra_special_tokens": {
                "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>",
                "image_token": "<image>",
            },
        },
    )


def lerobot_config(c, spec: PolicySpec) -> dict:
    """LeRobot's config.json for a SmolVLA of shapes `c` (SmolVLAConfig)."""
    joints = [len(spec.joint_names)]
    camera = spec.cameras[0]
    return {
        "type": "smolvla",
        "n_obs_steps": 1,
        "input_features": {
            STATE: {"type": "STATE", "shape": joints},
            **{cam.key: {"type": "VISUAL", "shape": [3, cam.crop[2], cam.crop[3]]} for cam in spec.cameras},
        },
        "output_features": {ACTION: {"type": "ACTION", "shape": joints}},
        "device": "cpu",
        "use_amp": False,
        "chunk_size": c.chunk_size,
        "n_action_steps": c.chunk_size,
        "normalization_mapping": {
            "VISUAL": NormalizationMode.IDENTITY.value,
            "STATE": spec.state.mode.value,
            "ACTION": spec.action.mode.value,
        },
        "max_state_dim": c.max_state_dim,
        "max_action_dim": c.max_action_dim,
        "resize_imgs_with_padding": [camera.width, camera.height],
        "empty_cameras": 0,
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "tokenizer_max_length": c.language_length,
        "num_steps": spec.num_steps,
        "use_cache": True,
        "freeze_vision_encoder": False,
        "train_expert_only": False,
        "train_state_proj": True,
        "vlm_model_name": BACKBONE,
        "load_vlm_weights": False,
        "add_image_special_tokens": bool(c.image_start_ids),
        "attention_mode": "cross_attn" if c.cross_attention else "self_attn",
        "prefix_length": -1,
        "pad_language_to": "max_length",
        "num_expert_layers": len(c.expert_layers),
        "num_vlm_layers": c.text_layers,
        "self_attn_every_n_layers": c.self_attention_every,
        "expert_width_multiplier": c.expert_width / c.text_width,
        "min_period": c.min_period,
        "max_period": c.max_period,
    }


def backbone_config(c) -> dict:
    """The SmolVLM config.json that transformers reads."""
    from vla_edge.policy.smolvla_positions import SPARE

    return {
        "model_type": "smolvlm",
        "architectures": ["SmolVLMForConditionalGeneration"],
        "image_token_id": SPECIAL_TOKENS.index("<image>"),
        "pad_token_id": 0,
        "scale_factor": c.scale_factor,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": c.vocabulary,
            "hidden_size": c.text_width,
            "intermediate_size": c.text_hidden,
            "num_hidden_layers": c.text_layers,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "rms_norm_eps": c.text_eps,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "image_size": c.image_size + SPARE * c.patch_size,  # of the table of positions, not of the images
            "patch_size": c.patch_size,
            "hidden_size": c.vision_width,
            "intermediate_size": c.vision_hidden,
            "num_hidden_layers": c.vision_layers,
            "num_attention_heads": c.vision_heads,
            "layer_norm_eps": c.vision_eps,
        },
    }


def _robot_facts(c, spec: PolicySpec) -> dict:
    narrow = {} if c.expert_hidden == expert_hidden(c.expert_width) else {"expert_hidden": c.expert_hidden}
    return {
        **narrow,
        "joint_names": list(spec.joint_names),
        "dt": spec.dt,
        "relative_actions": spec.relative_actions,
        **({"trained_prefix": spec.trained_prefix} if spec.trained_prefix else {}),
        "cameras": {
            cam.name: {"height": cam.source_height, "width": cam.source_width, "crop": list(cam.crop)}
            for cam in spec.cameras
        },
    }


def _write_processors(directory: Path, spec: PolicySpec) -> None:
    from safetensors.numpy import save_file

    statistics = {
        f"{feature}.{name}": np.asarray(values, np.float32)
        for feature, normalization in ((STATE, spec.state), (ACTION, spec.action))
        for name, values in normalization.statistics.items()
    }
    joints = [len(spec.joint_names)]
    norm_map = {"VISUAL": "IDENTITY", "STATE": spec.state.mode.value, "ACTION": spec.action.mode.value}
    inputs = {STATE: {"type": "STATE", "shape": joints}}
    inputs |= {cam.key: {"type": "VISUAL", "shape": [3, cam.crop[2], cam.crop[3]]} for cam in spec.cameras}
    output = {ACTION: {"type": "ACTION", "shape": joints}}

    def step(name: str, **config) -> dict:
        return {"registry_name": name, "config": config}

    steps = {
        PREPROCESSOR: [
            step("rename_observations_processor", rename_map={}),
            step("to_batch_processor"),
            *([step(NEW_LINE)] if spec.prompt.endswith("\n") else []),
            step(
                "tokenizer_processor",
                max_length=spec.tokenizer_max_length,
                task_key="task",
                padding_side="right",
                padding="max_length",
                truncation=True,
                tokenizer_name=BACKBONE,
            ),
            step("device_processor", device="cpu", float_dtype=None),
            step(NORMALIZER, eps=spec.state.eps, features=inputs | output, norm_map=norm_map),
        ],
        POSTPROCESSOR: [
            step(UNNORMALIZER, eps=spec.action.eps, features=output, norm_map=norm_map),
            step("device_processor", device="cpu", float_dtype=None),
        ],
    }
    for pipeline, entries in steps.items():
        for index, entry in enumerate(entries):
            if entry["registry_name"] in (NORMALIZER, UNNORMALIZER):
                entry["state_file"] = f"{pipeline}_step_{index}_{entry['registry_name']}.safetensors"
                save_file(statistics, directory / entry["state_file"])
        _write_json(directory / f"{pipeline}.json", {"name": pipeline, "steps": entries})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
