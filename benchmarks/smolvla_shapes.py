"""A checkpoint of SmolVLA-450M's own shapes with random weights: for timing and for memory, never for a robot."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WORDS = ["touch", "the", "red", "green", "cube", "ball", "with", "your", "left", "right", "hand"]
JOINTS = tuple(f"joint_{index}" for index in range(6))
# lerobot/smolvla_base and its backbone, SmolVLM2-500M
SIZES = {
    "image_size": 512, "patch_size": 16, "scale_factor": 4, "vision_width": 768, "vision_hidden": 3072,
    "vision_layers": 12, "vision_heads": 12, "vision_eps": 1e-6, "vocabulary": 49280, "text_width": 960,
    "text_hidden": 2560, "text_layers": 16, "heads": 15, "kv_heads": 5, "head_dim": 64, "text_eps": 1e-5,
    "expert_width": 720, "expert_hidden": 2048, "expert_every": 1, "self_attention_every": 2, "cross_attention": True,
    "chunk_size": 50, "max_state_dim": 32, "max_action_dim": 32, "language_length": 48, "min_period": 4e-3,
    "max_period": 4.0,
}  # fmt: skip


def write_smolvla(directory: Path, cameras: int, **changes) -> Path:
    """The checkpoint `directory`, written once.

    Args:
        changes: other sizes than `SIZES`.
    """
    import torch

    from vla_edge.policy.checkpoint_writer import write_checkpoint
    from vla_edge.policy.smolvla import SmolVLA, SmolVLAConfig

    if (directory / "model.safetensors").is_file():
        return directory
    sizes = SIZES | changes
    torch.manual_seed(0)
    policy = SmolVLA(SmolVLAConfig(cameras=cameras, **sizes)).eval()
    return write_checkpoint(directory, policy, _spec(cameras, sizes), WORDS)


def observations(spec, count: int) -> list:
    """Noise for every camera, two episodes."""
    from vla_edge.types import JointState, Observation

    rng = np.random.default_rng(0)
    return [
        Observation(
            10_000_000_000 * (index % 2) + 200_000_000 * index,
            {
                camera.name: rng.integers(0, 256, (camera.source_height, camera.source_width, 3), dtype=np.uint8)
                for camera in spec.cameras
            },
            JointState(0, spec.joint_names, rng.normal(0, 0.3, len(spec.joint_names))),
            f"touch the {('red', 'green')[index % 2]} cube with your left hand",
        )
        for index in range(count)
    ]


def _spec(cameras: int, sizes: dict):
    from vla_edge.policy.spec import CameraSpec, Normalization, NormalizationMode, PolicySpec

    size = sizes["image_size"]
    scale = Normalization(NormalizationMode.MEAN_STD, {"mean": (0.0,) * len(JOINTS), "std": (1.0,) * len(JOINTS)})
    views = tuple(
        CameraSpec(f"camera{i}", f"observation.images.camera{i}", size, size, (0, 0, size, size), size, size)
        for i in range(1, cameras + 1)
    )
    return PolicySpec(
        "smolvla", JOINTS, views, sizes["chunk_size"], 0.05, 10, sizes["max_state_dim"], sizes["max_action_dim"],
        sizes["language_length"], "{instruction}\n", False, scale, scale,
    )  # fmt: skip
