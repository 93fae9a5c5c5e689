"""A smaller policy made of a SmolVLA: of fewer joints, with fewer channels in its feed-forwards. See `families`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vla_edge.policy.spec import PolicySpec

if TYPE_CHECKING:
    from vla_edge.policy.checkpoint import Checkpoint
    from vla_edge.policy.smolvla import SmolVLA


def keep_joints(policy: SmolVLA, columns: Sequence[int]) -> None:
    """Make a policy's state and actions those of some of its joints, in place."""
    import torch

    columns, count = list(columns), len(columns)
    prefix, expert = policy.prefix, policy.denoise
    with torch.no_grad():
        for layer in (prefix.state_proj, expert.action_in):
            layer.weight = torch.nn.Parameter(layer.weight[:, columns].clone())
            layer.in_features = count
        out = expert.action_out
        for name in ("weight", "bias"):
            setattr(out, name, torch.nn.Parameter(getattr(out, name)[columns].clone()))
        out.out_features = count
    policy.config = prefix.config = replace(policy.config, max_state_dim=count, max_action_dim=count)


def write(directory: str | Path, policy: SmolVLA, spec: PolicySpec, checkpoint: Checkpoint) -> Path:
    """See `checkpoint_writer.write_checkpoint`; the tokenizer is that of `checkpoint`."""
    from vla_edge.policy.checkpoint_writer import write_checkpoint

    encoder, prefix, expert = policy.vision.encoder, policy.prefix, policy.denoise
    widths = {"vision_hidden": encoder.layers[0].mlp.up, "expert_hidden": expert.layers[0].mlp.up}
    if len(prefix.layers):
        widths["text_hidden"] = prefix.layers[0].mlp.up
    shapes = {name: layer.out_features for name, layer in widths.items()}
    policy.config = prefix.config = replace(policy.config, **shapes)
    return write_checkpoint(directory, policy, spec, checkpoint.tokenizer_path.parent)
