"""A SmolVLA just large enough to be written and read, with two cameras and a constant joint."""

from __future__ import annotations

from vla_edge.policy.spec import CameraSpec, Normalization, NormalizationMode, PolicySpec

WORDS = "touch the red green cube ball with your left right hand".split()
JOINTS = ("b_joint", "a_joint", "c_joint")
STATISTICS = {"mean": (0.5, -0.25, 0.0), "std": (0.5, 0.25, 0.0), "min": (-1.0, -0.5, 0.0), "max": (2.0, 0.5, 0.0)}


def small_spec(**changes) -> PolicySpec:
    entries = {
        "family": "smolvla",
        "joint_names": JOINTS,
        "cameras": (
            CameraSpec("head", "observation.images.head", 60, 80, (6, 16, 48, 48), 16, 16),
            CameraSpec("wrist", "observation.images.wrist", 20, 24, (0, 0, 20, 24), 16, 16),
        ),
        "chunk_size": 4,
        "dt": 0.05,
        "num_steps": 3,
        "max_state_dim": 5,
        "max_action_dim": 6,
        "tokenizer_max_length": 12,
        "prompt": "{instruction}\n",
        "relative_actions": True,
        "state": Normalization(NormalizationMode.MEAN_STD, STATISTICS),
        "action": Normalization(NormalizationMode.MIN_MAX, STATISTICS, eps=1e-6),
    }
    return PolicySpec(**(entries | changes))


def small_policy():
    import torch

    from vla_edge.policy.smolvla import SmolVLA, SmolVLAConfig

    torch.manual_seed(0)
    return SmolVLA(
        SmolVLAConfig(
            cameras=2, image_size=16, patch_size=4, scale_factor=2, vision_width=12, vision_hidden=20, vision_layers=1,
            vision_heads=2, vision_eps=1e-6, vocabulary=len(WORDS) + 5, text_width=16, text_hidden=24, text_layers=2,
            heads=4, kv_heads=2, head_dim=6, text_eps=1e-5, expert_width=12, expert_hidden=256, expert_every=1,
            self_attention_every=2, cross_attention=True, chunk_size=4, max_state_dim=5, max_action_dim=6,
            language_length=12, min_period=4e-3, max_period=4.0,
        )
    ).eval()  # fmt: skip
