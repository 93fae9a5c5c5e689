"""Write a random pi0 or pi0.5 as openpi's conversion to PyTorch does, and what openpi makes of a few observations.

    PYTHONPATH=<openpi>/src python tools/parity/generate_openpi.py --variant openpi_pi05 --output test/parity/pi/openpi_pi05

<openpi> is the source of github.com/Physical-Intelligence/openpi. Nothing of vla_edge is imported, and nothing of openpi
replaced but the sizes of its networks and the vocabulary of its tokenizer, which lies behind a network.
"""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import numpy as np
import torch
from generate_pi import Variant, smaller_networks, write_tokenizer
from random_policies import TASKS, Camera, asked, cropped, picture, randomize_, write_robot_facts

CAMERAS = {"base_0_rgb": Camera(60, 80, (2, 5, 56, 70)), "left_wrist_0_rgb": Camera(56, 56, (0, 0, 56, 56))}
# openpi adds up the flow time in float32; of quarters the sum is exact
NUM_STEPS = 4
ABSENT, IMAGE, ROBOT = "right_wrist_0_rgb", 224, "tabletop"
VARIANTS = {
    "openpi_pi0": Variant("pi0", CAMERAS, "MEAN_STD", "MEAN_STD", patch_size=28, tokenizer_max_length=48),
    "openpi_pi05": Variant("pi05", CAMERAS, "QUANTILES", "QUANTILES", patch_size=28, tokenizer_max_length=200),
}


def main() -> None:
    arguments = asked(__doc__, VARIANTS)
    variant, output = VARIANTS[arguments.variant], arguments.output
    checkpoint, cache = output / "checkpoint", output / "cache"
    write_tokenizer(cache)
    checkpoint.mkdir(parents=True, exist_ok=True)
    shutil.copy(next(cache.rglob("tokenizer.json")), checkpoint / "tokenizer.json")
    shutil.rmtree(cache)
    model = make_policy(variant)
    norm_stats = save(checkpoint, model, variant, np.random.default_rng(arguments.seed))
    write_robot_facts(checkpoint / "vla_edge.json", variant.joints, False, variant.cameras)
    arrays = references(model, variant, norm_stats, checkpoint, np.random.default_rng(1))
    np.savez_compressed(output / "reference.npz", **arrays)
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>9} {path.relative_to(output)}")


def make_policy(variant: Variant):
    """openpi's PI0Pytorch."""
    import openpi.models.gemma as gemma
    from openpi.models_pytorch import gemma_pytorch
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    shapes = {"gemma_2b": variant.text, "gemma_300m": variant.expert}
    gemma.get_config = lambda name: gemma.Config(depth=variant.layers, num_heads=8, num_kv_heads=1, **shapes[name])
    smaller_networks(gemma_pytorch, variant)
    config = types.SimpleNamespace(
        pi05=variant.family == "pi05",
        paligemma_variant="gemma_2b",
        action_expert_variant="gemma_300m",
        dtype="float32",
        action_dim=variant.max_dim,
        action_horizon=variant.chunk_size,
        pytorch_compile_mode=None,
    )
    model = PI0Pytorch(config).eval()
    torch.set_float32_matmul_precision("highest")  # openpi lowers it, and the reference is float32
    randomize_(model, norm=0.0)
    return model


def save(directory: Path, model, variant: Variant, rng: np.random.Generator) -> dict:
    """What examples/convert_jax_model_to_pytorch.py leaves behind; returns the statistics."""
    import safetensors.torch
    from openpi.shared import normalize

    safetensors.torch.save_model(model, str(directory / "model.safetensors"))
    said = {
        "action_dim": variant.max_dim, "action_horizon": variant.chunk_size, "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m", "precision": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(said, indent=2))
    stats = {}
    for feature in ("state", "actions"):
        values = rng.normal(rng.normal(0, 0.5, variant.joints), rng.uniform(0.1, 0.8, variant.joints), (500, variant.joints))
        stats[feature] = normalize.NormStats(
            mean=values.mean(0), std=values.std(0), q01=np.quantile(values, 0.01, 0), q99=np.quantile(values, 0.99, 0)
        )
    normalize.save(directory / "assets" / ROBOT, stats)
    return normalize.load(directory / "assets" / ROBOT)


@torch.no_grad()
def references(model, variant: Variant, norm_stats, checkpoint: Path, rng) -> dict[str, np.ndarray]:
    """`<index>.<name>` -> array, for one observation per task, through openpi's own transforms."""
    from openpi import transforms
    from openpi.models.tokenizer import PaligemmaTokenizer
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer = PaligemmaTokenizer.__new__(PaligemmaTokenizer)
    tokenizer._max_len = variant.tokenizer_max_length
    tokenizer._tokenizer = types.SimpleNamespace(
        encode=lambda text, add_bos=False: words.encode(text).ids[0 if add_bos else 1 :]
    )
    later = variant.family == "pi05"
    before = (
        transforms.Normalize(norm_stats, use_quantiles=later),
        transforms.ResizeImages(IMAGE, IMAGE),
        transforms.TokenizePrompt(tokenizer, discrete_state_input=later),
        transforms.PadStatesAndActions(variant.max_dim),
    )
    after = transforms.Unnormalize({"actions": norm_stats["actions"]}, use_quantiles=later)
    velocities: list[torch.Tensor] = []
    denoise = model.denoise_step
    model.denoise_step = lambda *given, **named: velocities.append(denoise(*given, **named)) or velocities[-1]
    arrays = {"tasks": np.array(TASKS), "num_steps": np.array(NUM_STEPS)}
    for index, task in enumerate(TASKS):
        frames = {name: picture(camera.height, camera.width, rng) for name, camera in variant.cameras.items()}
        state = rng.normal(0, 0.5, variant.joints).astype(np.float32)
        noise = rng.standard_normal((1, variant.chunk_size, variant.max_dim), dtype=np.float32)
        images = {name: cropped(frames[name], camera) for name, camera in variant.cameras.items()}
        images[ABSENT] = np.zeros_like(next(iter(images.values())))
        data = {"state": state, "image": images, "prompt": np.asarray(task)}
        for transform in before:
            data = transform(data)
        seen = {
            name: torch.from_numpy(image.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
            for name, image in data["image"].items()
        }
        observation = types.SimpleNamespace(
            images=seen,
            image_masks={name: torch.tensor([name != ABSENT]) for name in seen},
            state=torch.from_numpy(data["state"].astype(np.float32))[None],
            tokenized_prompt=torch.from_numpy(data["tokenized_prompt"])[None].long(),
            tokenized_prompt_mask=torch.from_numpy(data["tokenized_prompt_mask"])[None],
            token_ar_mask=None,
            token_loss_mask=None,
        )
        velocities.clear()
        actions = model.sample_actions(
            torch.device("cpu"), observation, noise=torch.from_numpy(noise.copy()), num_steps=NUM_STEPS
        )
        found = {
            "positions": state,
            "noise": noise,
            "tokens": observation.tokenized_prompt,
            "mask": observation.tokenized_prompt_mask,
            "state": observation.state,
            "velocity": velocities[0],
            "actions": after({"actions": actions.numpy()})["actions"][..., : variant.joints],
            **{f"frame.{name}": frame for name, frame in frames.items()},
        }
        arrays |= {f"{index}.{name}": np.asarray(value) for name, value in found.items()}
        for name in variant.cameras:  # large: what the first row of patches sees is enough
            arrays[f"{index}.image.{name}"] = np.asarray(seen[name])[..., ::16, :]
    return arrays


if __name__ == "__main__":
    main()
