"""pi0 (Black et al., 2024, arXiv:2410.24164): PaliGemma and a flow-matching action expert that reads its keys and
values; the state is the expert's first token.

That token sees the observation alone, but going through every layer of the expert it would need a second copy of them
in the prefix stage; it stays with the actions, one token beside fifty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.blocks import MASKED, DecoderLayer, Fold, RMSNorm, attend, padding_bias, rotate, sinusoid
from vla_edge.policy.chain import Chain, numbered
from vla_edge.policy.paligemma import ACTIVATION, EPS, PiConfig, PiPolicy, PrefixEncoder
from vla_edge.policy.stages import TensorSpec


class PrefixCache(NamedTuple):
    """As `paligemma.PrefixCache`, with the state as the expert's token (B, 1, expert_width)."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor
    state: Tensor


class StatePrefix(PrefixEncoder):
    """The prefix, and the state (B, max_state_dim) as a token of the expert."""

    CACHE = PrefixCache
    END = (*PrefixEncoder.END, "state_proj")

    def __init__(self, c: PiConfig):
        super().__init__(c, suffix=1 + c.chunk_size)
        self.state_proj = nn.Linear(c.max_state_dim, c.expert_width)

    def _end(self, mask: Tensor, suffix: Tensor, inputs: Sequence) -> tuple[Tensor, ...]:
        return (*super()._end(mask, suffix, inputs), self.state_proj(inputs[3])[:, None])


class TimeEncoder(nn.Module):
    """Flow time (B,) -> its share in the first layer of the action-time MLP, (B, expert_width)."""

    def __init__(self, c: PiConfig):
        super().__init__()
        self.width, self.periods = c.expert_width, (c.min_period, c.max_period)
        self.mlp_in = nn.Linear(c.expert_width, c.expert_width)

    def forward(self, time: Tensor) -> tuple[Tensor]:
        return (self.mlp_in(sinusoid(time, self.width, *self.periods)),)


class ActionExpert(Chain):
    """Noisy actions x (B, T, A) and the prefix cache -> flow velocity (B, T, A), pointing at the noise."""

    def __init__(self, c: PiConfig):
        super().__init__()
        self.chunk_size = c.chunk_size
        self.action_in = nn.Linear(c.max_action_dim, c.expert_width)
        self.mlp_in = nn.Linear(c.expert_width, c.expert_width, bias=False)
        self.mlp_out = nn.Linear(c.expert_width, c.expert_width)
        self.layers = nn.ModuleList(
            DecoderLayer(c.expert_width, c.expert_hidden, c.heads, c.kv_heads, c.head_dim, EPS, ACTIVATION)
            for _ in range(c.text_layers)
        )
        self.norm = RMSNorm(c.expert_width, EPS)
        self.action_out = nn.Linear(c.expert_width, c.max_action_dim)
        # the state never looks at the actions; they look at each other and at the state
        own = torch.zeros(1 + c.chunk_size, 1 + c.chunk_size)
        own[0, 1:] = MASKED
        self.register_buffer("own_bias", own[None, None], persistent=False)

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        return ("action_in", "mlp_in", "mlp_out"), *numbered("layers", self.layers), ("norm", "action_out")

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`."""
        x, time_condition, keys, values, mask, cos, sin, state = inputs
        if number == 0:
            actions = self.mlp_out(F.silu(self.mlp_in(self.action_in(x)) + time_condition[:, None]))
            h = torch.cat([state, actions], dim=1)
            batch, length = h.shape[:2]
            prefix_bias = padding_bias(mask).expand(-1, -1, length, -1)
            return (h, torch.cat([prefix_bias, self.own_bias.expand(batch, -1, -1, -1)], dim=-1)), ()
        h, bias = handed
        index = number - 1
        if index == len(self.layers):
            return (self.action_out(self.norm(h[:, -self.chunk_size :])),), ()
        layer = self.layers[index]
        normed = layer.attention_norm(h)
        own_k, own_v = layer.project(normed, normed)
        k = torch.cat([keys[index], rotate(own_k, cos, sin)], dim=2)
        v = torch.cat([values[index], own_v], dim=2)
        return (layer.finish(h, attend(rotate(layer.queries(normed), cos, sin), k, v, bias)[0]), bias), ()

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.norm, (self.action_out,)),)


class Pi0(PiPolicy):
    """The whole policy, made of its stages."""

    def __init__(self, config: PiConfig):
        super().__init__(
            config,
            StatePrefix(config),
            TimeEncoder(config),
            ActionExpert(config),
            condition=(1, config.expert_width),
            reads=(TensorSpec("state", (1, config.max_state_dim)),),
            gives=(TensorSpec("state_token", (1, 1, config.expert_width)),),
        )
