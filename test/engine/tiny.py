"""A tiny SmolVLA of random weights and observations for it."""

from __future__ import annotations

import numpy as np

from vla_edge.policy.spec import CameraSpec, Normalization, NormalizationMode, PolicySpec
from vla_edge.types import JointState, Observation

WORDS = "touch the red green cube ball with your left right hand".split()
JOINTS = ("b_joint", "a_joint", "c_joint")


def tiny_spec() -> PolicySpec:
    scale = Normalization(NormalizationMode.MEAN_STD, {"mean": (0.1, -0.2, 0.0), "std": (0.5, 0.4, 0.3)})
    camera = CameraSpec("head", "observation.images.head", 32, 48, (0, 8, 32, 32), 32, 32)
    return PolicySpec("smolvla", JOINTS, (camera,), 8, 0.05, 3, 8, 8, 12, "{instruction}\n", True, scale, scale)


def tiny_policy():
    import torch

    from vla_edge.policy.smolvla import SmolVLA, SmolVLAConfig

    torch.manual_seed(0)
    return SmolVLA(
        SmolVLAConfig(
            cameras=1, image_size=32, patch_size=8, scale_factor=2, vision_width=32, vision_hidden=64, vision_layers=1,
            vision_heads=2, vision_eps=1e-6, vocabulary=len(WORDS) + 5, text_width=32, text_hidden=64, text_layers=2,
            heads=4, kv_heads=2, head_dim=8, text_eps=1e-5, expert_width=24, expert_hidden=256, expert_every=1,
            self_attention_every=2, cross_attention=True, chunk_size=8, max_state_dim=8, max_action_dim=8,
            language_length=12, min_period=4e-3, max_period=4.0,
        )
    ).eval()  # fmt: skip


def make_observations(count: int, seed: int = 0) -> list[Observation]:
    """Episodes of six frames, the instruction changing with each."""
    rng = np.random.default_rng(seed)
    return [
        Observation(
            200_000_000 * index + 5_000_000_000 * (index // 6),
            {"head": rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)},
            JointState(0, JOINTS, rng.normal(0, 0.3, 3)),
            f"touch the {('red', 'green')[index // 6 % 2]} cube with your left hand",
        )
        for index in range(count)
    ]
