"""pi0.5 (Physical Intelligence, 2025, arXiv:2504.16054): PaliGemma, which reads the state as words of its prompt, and a
flow-matching action expert whose norms are set by the flow time (adaptive RMSNorm, after Peebles & Xie, 2022).

What the norms are set to depends on the time alone, so all of it is computed by the time stage, when the engine is
loaded; the denoise stage multiplies and adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.blocks import GatedMLP, KeyValue, attend, padding_bias, rotate, sinusoid, split_heads
from vla_edge.policy.chain import Chain, numbered
from vla_edge.policy.paligemma import ACTIVATION, EPS, PiConfig, PiPolicy, PrefixEncoder


class TimeEncoder(nn.Module):
    """Flow time (B,) -> scale, shift and gate of every norm, (B, 2 * layers + 1, 3 * expert_width)."""

    def __init__(self, c: PiConfig):
        super().__init__()
        self.width, self.periods = c.expert_width, (c.min_period, c.max_period)
        self.mlp_in = nn.Linear(c.expert_width, c.expert_width)
        self.mlp_out = nn.Linear(c.expert_width, c.expert_width)
        self.norms = nn.ModuleList(
            nn.Linear(c.expert_width, 3 * c.expert_width) for _ in range(2 * c.text_layers + 1)
        )

    def forward(self, time: Tensor) -> tuple[Tensor]:
        condition = F.silu(self.mlp_out(F.silu(self.mlp_in(sinusoid(time, self.width, *self.periods)))))
        return (torch.stack([norm(condition) for norm in self.norms], dim=1),)


class AdaptiveLayer(KeyValue):
    """A Gemma layer whose two norms and residual gates are given."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__(width, kv_heads, head_dim)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp = GatedMLP(width, hidden, ACTIVATION)

    def queries(self, x: Tensor) -> Tensor:
        """Normalized input (B, T, width) -> (B, H, T, hd)."""
        return split_heads(self.q(x), self.head_dim)

    def finish(self, x: Tensor, attended: Tensor, gate: Tensor, modulation: Tensor) -> Tensor:
        """Residual, then the feed-forward half: (B, T, width)."""
        x = x + self.out(attended) * gate
        normed, gate = adaptive_norm(x, modulation)
        return x + self.mlp(normed) * gate


def adaptive_norm(x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, T, W) normalized, scaled and shifted by `modulation` (B, 3 W), and the gate (B, 1, W) of what follows."""
    scale, shift, gate = modulation[:, None].chunk(3, dim=-1)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return normed * (1 + scale) + shift, gate


class ActionExpert(Chain):
    """Noisy actions x (B, T, A) and the prefix cache -> flow velocity (B, T, A), pointing at the noise."""

    def __init__(self, c: PiConfig):
        super().__init__()
        self.action_in = nn.Linear(c.max_action_dim, c.expert_width)
        self.layers = nn.ModuleList(
            AdaptiveLayer(c.expert_width, c.expert_hidden, c.heads, c.kv_heads, c.head_dim)
            for _ in range(c.text_layers)
        )
        self.action_out = nn.Linear(c.expert_width, c.max_action_dim)

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        return ("action_in",), *numbered("layers", self.layers), ("action_out",)

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`."""
        x, time_condition, keys, values, mask, cos, sin = inputs
        if number == 0:
            h = self.action_in(x)
            # actions all see each other, and the prefix as far as it is real
            return (h, F.pad(padding_bias(mask), (0, h.shape[1]))), ()
        h, bias = handed
        index = number - 1
        if index == len(self.layers):
            return (self.action_out(adaptive_norm(h, time_condition[:, -1])[0]),), ()
        layer = self.layers[index]
        normed, gate = adaptive_norm(h, time_condition[:, 2 * index])
        own_k, own_v = layer.project(normed, normed)
        k = torch.cat([keys[index], rotate(own_k, cos, sin)], dim=2)
        v = torch.cat([values[index], own_v], dim=2)
        attended, _ = attend(rotate(layer.queries(normed), cos, sin), k, v, bias)
        return (layer.finish(h, attended, gate, time_condition[:, 2 * index + 1]), bias), ()


class Pi05(PiPolicy):
    """The whole policy, made of its stages."""

    def __init__(self, config: PiConfig):
        super().__init__(
            config,
            PrefixEncoder(config, suffix=config.chunk_size),
            TimeEncoder(config),
            ActionExpert(config),
            condition=(1, 2 * config.text_layers + 1, 3 * config.expert_width),
        )
