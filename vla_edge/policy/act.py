"""ACT (Zhao et al., 2023, arXiv:2304.13705): ResNet features of the cameras and the state through an encoder, from which a
decoder reads a whole chunk in one pass.

It was trained as the decoder of a variational autoencoder whose latent is zero at inference: what is left of it is a
token that is always the same. The encoder of that autoencoder is not part of the policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_edge.policy.blocks import MLP, Fold, Units, attend, split_heads
from vla_edge.policy.resnet import ResNet, feature_size
from vla_edge.policy.stages import Stage, TensorSpec

TEMPERATURE, EPS = 10_000.0, 1e-6


@dataclass(frozen=True)
class ACTConfig:
    """Shapes of an ACT.

    Attributes:
        height, width: of a picture, px.
        blocks, channels: of the ResNet's stages, and of its first.
        norm_first: whether norms stand before what they belong to; after it otherwise.
        state_dim, action_dim: S and A. chunk_size: T.
    """

    cameras: int
    height: int
    width: int
    blocks: tuple[int, ...]
    channels: int
    model_width: int
    hidden: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    activation: str
    norm_first: bool
    state_dim: int
    action_dim: int
    chunk_size: int

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera."""
        rows, columns = feature_size(self.height, self.width)
        return rows * columns


class VisionTower(nn.Module):
    """image (B, 3, H, W) -> image_tokens (B, N, model_width), row by row."""

    def __init__(self, c: ACTConfig):
        super().__init__()
        self.backbone = ResNet(c.blocks, c.channels, grouped=False)
        self.projection = nn.Linear(self.backbone.width, c.model_width)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.projection(self.backbone(image).flatten(1, 2)),)


class Attention(nn.Module):
    """Attention of (B, T, width) to (B, P, width), keys and values of which may be told apart by where they are."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            split_heads(project(x), self.head_dim)
            for project, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        return self.out(attend(q, k, v)[0])

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.v, (self.out,)),)  # attention mixes tokens and never channels

    def units(self) -> tuple[Units, ...]:
        """See `Units`."""
        makers = tuple((layer, self.head_dim) for layer in (self.q, self.k, self.v))
        return (Units("heads", self.q.out_features // self.head_dim, makers, ((self.out, self.head_dim),)),)


class Layer(nn.Module):
    """Parts that are each added to what comes in, with a norm before the part or after the sum."""

    def __init__(self, c: ACTConfig, crosses: bool):
        super().__init__()
        self.norm_first = c.norm_first
        self.own = Attention(c.model_width, c.heads)
        self.own_norm = nn.LayerNorm(c.model_width)
        self.cross = Attention(c.model_width, c.heads) if crosses else None
        self.cross_norm = nn.LayerNorm(c.model_width) if crosses else None
        self.mlp = MLP(c.model_width, c.hidden, c.activation)
        self.mlp_norm = nn.LayerNorm(c.model_width)

    def forward(self, x: Tensor, places: Tensor, seen: Tensor | None = None, seen_places: Tensor | None = None) -> Tensor:
        """x (B, T, width) at `places` (T, width), and what a decoder reads (B, P, width) at `seen_places` (P, width)."""
        x = self._add(x, self.own_norm, lambda h: self.own(h + places, h + places, h))
        if self.cross is not None:
            x = self._add(x, self.cross_norm, lambda h: self.cross(h + places, seen + seen_places, seen))
        return self._add(x, self.mlp_norm, self.mlp)

    def _add(self, x: Tensor, norm: nn.LayerNorm, part) -> Tensor:
        return x + part(norm(x)) if self.norm_first else norm(x + part(x))

    def folds(self) -> tuple[Fold, ...]:
        """Only of a norm whose channels nothing else reads."""
        return (Fold(self.mlp_norm, (self.mlp.up,)),) if self.norm_first else ()


class Act(nn.Module):
    """image_tokens (B, cameras * N, width) and state (B, S) -> normalized actions (B, T, A)."""

    def __init__(self, c: ACTConfig):
        super().__init__()
        self.state_in = nn.Linear(c.state_dim, c.model_width)
        self.latent = nn.Parameter(torch.zeros(c.model_width))  # what the projection makes of zero
        self.first_places = nn.Parameter(torch.zeros(2, c.model_width))  # of the latent and of the state
        self.encoder = nn.ModuleList(Layer(c, crosses=False) for _ in range(c.encoder_layers))
        self.encoder_norm = nn.LayerNorm(c.model_width) if c.norm_first else nn.Identity()
        self.queries = nn.Parameter(torch.zeros(c.chunk_size, c.model_width))
        self.decoder = nn.ModuleList(Layer(c, crosses=True) for _ in range(c.decoder_layers))
        self.decoder_norm = nn.LayerNorm(c.model_width)
        self.action_out = nn.Linear(c.model_width, c.action_dim)
        places = picture_places(*feature_size(c.height, c.width), c.model_width).repeat(c.cameras, 1)
        self.register_buffer("image_places", places, persistent=False)

    def forward(self, image_tokens: Tensor, state: Tensor) -> tuple[Tensor]:
        batch = state.shape[0]
        latent = self.latent.expand(batch, 1, -1)
        seen = torch.cat([latent, self.state_in(state)[:, None], image_tokens], dim=1)
        places = torch.cat([self.first_places, self.image_places])
        for layer in self.encoder:
            seen = layer(seen, places)
        seen = self.encoder_norm(seen)
        x = torch.zeros_like(self.queries).expand(batch, -1, -1)
        for layer in self.decoder:
            x = layer(x, self.queries, seen, places)
        return (self.action_out(self.decoder_norm(x)),)

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.decoder_norm, (self.action_out,)),)


class ACT(nn.Module):
    """The whole policy, made of its stages."""

    matched = "actions"

    def __init__(self, config: ACTConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.act = Act(config)

    def chunk(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor) -> Tensor:
        """Normalized actions (1, T, A), differentiable; there are no words."""
        return self.act(image_tokens, state)[0]

    def say(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor, **_) -> tuple[Tensor]:
        """For training (`learn.outputs`): actions (B, T, A). There are no words, and nothing is read again to be compared."""
        return self.act(image_tokens, state)

    def stages(self) -> tuple[Stage, ...]:
        """vision and act; batch 1, static shapes (see `policy.stages`)."""
        c = self.config
        image = TensorSpec("image", (1, 3, c.height, c.width))
        tokens = TensorSpec("image_tokens", (1, c.image_tokens, c.model_width))
        all_tokens = TensorSpec("image_tokens", (1, c.cameras * c.image_tokens, c.model_width))
        state = TensorSpec("state", (1, c.state_dim))
        actions = TensorSpec("actions", (1, c.chunk_size, c.action_dim))
        return (
            Stage("vision", self.vision, (image,), (tokens,)),
            Stage("act", self.act, (all_tokens, state), (actions,)),
        )


def picture_places(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width): where each token is, sines and cosines of its row in the first half of the channels and of
    its column in the second (Carion et al., 2020, arXiv:2005.12872)."""
    half = width // 2
    frequency = TEMPERATURE ** (2 * (torch.arange(half, dtype=torch.float32) // 2) / half)

    def along(count: int) -> Tensor:
        places = torch.arange(1, count + 1, dtype=torch.float32)
        turns = (places / (places[-1] + EPS) * (2 * math.pi))[:, None] / frequency
        return torch.stack([turns[:, 0::2].sin(), turns[:, 1::2].cos()], dim=-1).flatten(1)

    vertical, horizontal = along(rows)[:, None], along(columns)[None]
    whole = [vertical.expand(-1, columns, -1), horizontal.expand(rows, -1, -1)]
    return torch.cat(whole, dim=-1).flatten(0, 1)
