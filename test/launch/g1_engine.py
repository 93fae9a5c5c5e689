"""A tiny policy of random weights for the G1's joints and camera: fast to build, and as careful as a large one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_edge.policy.spec import CameraSpec, Normalization, NormalizationMode, PolicySpec
from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.types import JointState, Observation

WORDS = "touch the red green cube ball with your left right hand".split()
INSTRUCTION = "touch the red cube with your left hand"


def write_checkpoint(directory: Path) -> Path:
    """Actions stay within a few hundredths of a radian of where the robot stands."""
    import torch

    from vla_edge.policy.checkpoint_writer import write_checkpoint as write
    from vla_edge.policy.smolvla import SmolVLA, SmolVLAConfig

    joints = len(DRIVEN_JOINTS)
    state = Normalization(NormalizationMode.MEAN_STD, {"mean": (0.0,) * joints, "std": (0.5,) * joints})
    action = Normalization(NormalizationMode.MEAN_STD, {"mean": (0.0,) * joints, "std": (0.01,) * joints})
    camera = CameraSpec("head", "observation.images.head", 480, 640, (0, 80, 480, 480), 32, 32)
    spec = PolicySpec(
        "smolvla", DRIVEN_JOINTS, (camera,), 32, 0.05, 2, 16, 16, 12, "{instruction}\n", True, state, action
    )
    torch.manual_seed(0)
    policy = SmolVLA(
        SmolVLAConfig(
            cameras=1, image_size=32, patch_size=8, scale_factor=2, vision_width=32, vision_hidden=64, vision_layers=1,
            vision_heads=2, vision_eps=1e-6, vocabulary=len(WORDS) + 5, text_width=32, text_hidden=64, text_layers=2,
            heads=4, kv_heads=2, head_dim=8, text_eps=1e-5, expert_width=24, expert_hidden=256, expert_every=1,
            self_attention_every=2, cross_attention=True, chunk_size=32, max_state_dim=16, max_action_dim=16,
            language_length=12, min_period=4e-3, max_period=4.0,
        )
    ).eval()  # fmt: skip
    return write(directory, policy, spec, WORDS)


def observations(count: int) -> list[Observation]:
    """Random pictures and postures, the instruction changing with every sixth."""
    rng = np.random.default_rng(0)
    joints = len(DRIVEN_JOINTS)
    return [
        Observation(
            200_000_000 * i + 5_000_000_000 * (i // 6),
            {"head": rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)},
            JointState(0, DRIVEN_JOINTS, rng.normal(0, 0.3, joints)),
            f"touch the {('red', 'green')[i // 6 % 2]} cube with your left hand",
        )
        for i in range(count)
    ]
