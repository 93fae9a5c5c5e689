"""What the generators of references share: tasks, pictures, statistics, and weights at which every part matters."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

STATE, ACTION = "observation.state", "action"
WORDS = "touch push the red green blue yellow cube ball with your left right hand to side please now".split()
TASKS = (
    "touch the red cube with your left hand",
    "Please push the green ball to the right side now",
    "touch the mauve cube",
)


@dataclass(frozen=True)
class Camera:
    """Frames of `height` x `width` px of which `crop` (y, x, h, w) is the checkpoint's feature."""

    height: int
    width: int
    crop: tuple[int, int, int, int]


def asked(description: str, variants: Mapping, threads: int = 1) -> argparse.Namespace:
    """What a generator is told, with `output` resolved; PyTorch gets its seed and threads.

    Args:
        description: docstring of the generator, whose first line is shown. variants: name -> what can be made.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--variant", choices=variants, required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory for checkpoint/ and reference.npz")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(threads)
    torch.manual_seed(arguments.seed)
    arguments.output = arguments.output.resolve()
    return arguments


def cropped(frame: np.ndarray, camera: Camera) -> np.ndarray:
    """What the checkpoint's feature is of a frame."""
    y, x, height, width = camera.crop
    return frame[y : y + height, x : x + width]


def write_robot_facts(
    path: Path, joints: int, relative_actions: bool, cameras: Mapping[str, Camera], **more
) -> None:
    """What training libraries do not say and a robot must know (vla_edge's file)."""
    facts = {
        "joint_names": [f"joint_{index}" for index in range(joints)],
        "dt": 0.05,
        "relative_actions": relative_actions,
        "cameras": {name: dataclasses.asdict(camera) for name, camera in cameras.items()},
        **more,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def randomize_(policy: torch.nn.Module, norm: float = 1.0) -> None:
    """Weights at which every part matters: freshly initialized ones leave attention flat and norms alike.

    Args:
        norm: about which the weights of norms lie.
    """
    for name, parameter in policy.named_parameters():
        if parameter.ndim == 1 and (name.endswith("norm.weight") or "layernorm" in name or "layer_norm" in name):
            parameter.copy_(0.2 * torch.randn_like(parameter) + (0 if name.endswith("bias") else norm))
        elif name.endswith("bias"):
            parameter.copy_(0.2 * torch.randn_like(parameter))
        elif "embed_tokens" in name:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
        elif "position_embedding" in name:
            parameter.copy_(torch.randn_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter[0].numel() ** 0.5)


def statistics(joints: int, rng: np.random.Generator) -> dict[str, dict[str, torch.Tensor]]:
    """As a dataset's, the last state dimension constant."""
    result = {}
    for feature in (STATE, ACTION):
        mean, spread = rng.normal(0, 0.5, joints), rng.uniform(0.1, 0.8, joints)
        values = rng.normal(mean, spread, (500, joints))
        if feature == STATE:
            values[:, -1] = 0.25
        quantiles = {f"q{percent:02d}": np.quantile(values, percent / 100, axis=0) for percent in (1, 10, 50, 90, 99)}
        moments = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
        entries = {**moments, **quantiles, "count": np.array([len(values)])}
        result[feature] = {name: torch.tensor(value, dtype=torch.float32) for name, value in entries.items()}
    return result


def picture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8 with edges and gradients, and smooth enough to be stored in little."""
    y, x = np.mgrid[:height, :width]
    channels = []
    for _ in range(3):
        fx, fy, phase = rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.4), rng.uniform(0, 6)
        channels.append(127 + 100 * np.sin(fx * x + fy * y + phase))
    image = np.stack(channels, axis=-1).astype(np.uint8)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    image[top : top + height // 3, left : left + width // 3] = rng.integers(0, 256, 3)
    return image
