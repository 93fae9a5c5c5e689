"""GR00T N1.5 (NVIDIA, 2025, arXiv:2503.14734): Eagle 2.5 (SigLIP and the first layers of a Qwen3) reads pictures and
instruction, a few layers of self-attention go over what it gives, and a diffusion transformer (Peebles & Xie, 2022,
arXiv:2212.09748) leads noise to actions, looking at that in every second layer and at its own tokens in the others.

State and actions go in and out through networks that every embodiment has of its own; the policy is built with those of
one. What the original computes again in every flow step although it depends on the observation alone (keys and values of
the layers that look at it, the state's token) is given by the prefix stage, and what depends on the flow time alone
(scale and shift of every norm, the time's share in the action encoder) by the time stage. test/parity holds the result to
LeRobot's port.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.blocks import (
    MLP,
    DecoderLayer,
    EncoderLayer,
    Fold,
    KeyValue,
    RMSNorm,
    SeeingTower,
    VisionTransformer,
    attend,
    attention_columns,
    causal_bias,
    padding_bias,
    pixel_shuffle,
    rotary,
    rotate,
    split_heads,
)
from vla_edge.policy.chain import Chain, numbered
from vla_edge.policy.narrow import Narrowing, taken
from vla_edge.policy.stages import Stage, TensorSpec

DIT_EPS, OUT_EPS = 1e-5, 1e-6
TIME_CHANNELS, LONGEST = 256, 10_000.0
TIME_ROWS = 3  # besides those of the layers: scale and shift of the last norm, and the action encoder's share


@dataclass(frozen=True)
class GrootConfig:
    """Shapes of a GR00T N1.5.

    Attributes:
        image_size, patch_size: px. shuffle: side of the square of patches that becomes one token; 1 for none.
        connector: (inputs, outputs) of the linear layers between vision and language, with a norm before the first and
            GELU between them where there are two.
        image_places: where in the prompt's tokens each camera's stand, one of them in the place of all.
        wavelength: of the rotary embedding.
        adapter_*: of the self-attention over the language model's output.
        width: of the diffusion transformer; layer i looks at the observation when i is even.
        hidden: of the embodiment's networks for state and actions. future_tokens: learned tokens beside the actions.
        time_buckets: flow times that the network tells apart.
    """

    cameras: int
    image_size: int
    patch_size: int
    shuffle: int
    vision_width: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_eps: float
    connector: tuple[tuple[int, int], ...]
    vocabulary: int
    text_width: int
    text_hidden: int
    text_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    text_eps: float
    wavelength: float
    image_places: tuple[int, ...]
    language_length: int
    adapter_layers: int
    adapter_hidden: int
    adapter_heads: int
    width: int
    layers: int
    layers_hidden: int
    layers_heads: int
    output_width: int
    state_hidden: int
    decoder_hidden: int
    future_tokens: int
    positions: bool
    time_buckets: int
    chunk_size: int
    max_state_dim: int
    max_action_dim: int

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera."""
        return (self.image_size // self.patch_size // self.shuffle) ** 2

    @property
    def image_width(self) -> int:
        """Numbers of such a token."""
        return self.text_width

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width), px."""
        return self.image_size, self.image_size

    @property
    def prefix_length(self) -> int:
        """P: pictures in the middle of the prompt, each in the place of one of its tokens."""
        return self.cameras * (self.image_tokens - 1) + self.language_length

    @property
    def picture_places(self) -> tuple[int, ...]:
        """Where in the prefix each picture's tokens begin."""
        return tuple(place + camera * (self.image_tokens - 1) for camera, place in enumerate(self.image_places))

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Layers of the diffusion transformer that look at the observation."""
        return tuple(range(0, self.layers, 2))


class PrefixCache(NamedTuple):
    """What the diffusion transformer needs of one observation (E layers that look at it).

    Attributes:
        keys, values: (E, B, H, P, hd).
        mask: (B, P) 1 where a token is real.
        state: (B, 1, width) its token.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    state: Tensor


class VisionTower(SeeingTower):
    """image (B, 3, H, W) in [-1, 1] -> image_tokens (B, N, text_width)."""

    WORDS = ("connector_norm", "connector")

    def __init__(self, c: GrootConfig):
        super().__init__()
        self.encoder = VisionTransformer(
            c.image_size, c.patch_size, c.vision_width, c.vision_hidden, c.vision_layers, c.vision_heads, c.vision_eps
        )
        self.shuffle, layers = c.shuffle, [nn.Linear(*size) for size in c.connector]
        self.connector = layers[0] if len(layers) == 1 else nn.ModuleList(layers)
        self.connector_norm = nn.LayerNorm(c.connector[0][0]) if len(layers) == 2 else None

    def words(self, seen: Tensor) -> Tensor:
        """See `SeeingTower`."""
        x = pixel_shuffle(seen, self.shuffle) if self.shuffle > 1 else seen
        if self.connector_norm is None:
            return self.connector(x)
        first, second = self.connector
        return second(F.gelu(first(self.connector_norm(x))))

    def folds(self) -> tuple[Fold, ...]:
        """See `Fold`."""
        return () if self.connector_norm is None else (Fold(self.connector_norm, (self.connector[0],)),)


class QwenLayer(DecoderLayer):
    """A layer of Qwen3 (2025, arXiv:2505.09388): of each head queries and keys are normalized."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, head_dim: int, eps: float):
        super().__init__(width, hidden, heads, kv_heads, head_dim, eps)
        self.q_norm, self.k_norm = RMSNorm(head_dim, eps), RMSNorm(head_dim, eps)

    def queries(self, x: Tensor) -> Tensor:
        return self.q_norm(super().queries(x))

    def project(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().project(k, v)
        return self.k_norm(k), v


class PrefixEncoder(Narrowing):
    """Pictures, instruction and state -> what the diffusion transformer looks at, once per observation."""

    def __init__(self, c: GrootConfig):
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(c.vocabulary, c.text_width)
        self.layers = nn.ModuleList(
            QwenLayer(c.text_width, c.text_hidden, c.heads, c.kv_heads, c.head_dim, c.text_eps)
            for _ in range(c.text_layers)
        )
        self.norm: nn.Module = RMSNorm(c.text_width, c.text_eps)
        self.adapter_norm = nn.LayerNorm(c.text_width)
        self.adapter = nn.ModuleList(
            EncoderLayer(c.text_width, c.adapter_hidden, c.adapter_heads, DIT_EPS) for _ in range(c.adapter_layers)
        )
        self.cross = nn.ModuleDict(
            {
                str(layer): KeyValue(c.text_width, c.layers_heads, c.width // c.layers_heads, bias=True)
                for layer in c.cross_layers
            }
        )
        self.state_in = nn.Linear(c.max_state_dim, c.state_hidden)
        self.state_out = nn.Linear(c.state_hidden, c.width)
        self.store: nn.Module | None = None  # the cache crosses to the action head as it is
        self.sees((first + place for first in c.picture_places for place in range(c.image_tokens)), c.prefix_length)
        causal, (cos, sin) = causal_bias(c.prefix_length), self.turns(c)
        for name, table in (("causal", causal[None, None]), ("cos", cos), ("sin", sin), ("kinds", self.kinds_of(c))):
            self.register_buffer(name, table, persistent=False)

    def kinds_of(self, c: GrootConfig) -> Tensor:
        """What stands for a real token in the mask that goes with the cache, (1, P) or the same for all."""
        return torch.ones(())

    def turns(self, c: GrootConfig) -> tuple[Tensor, Tensor]:
        """cos and sin by which queries and keys of the text layers are turned, (1, P, hd / 2)."""
        return rotary(torch.arange(c.prefix_length)[None], c.head_dim, c.wavelength)

    def words(self, image_tokens: Tensor) -> Tensor:
        """What the text layers read of pictures."""
        return image_tokens

    def read(self, number: int, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, image_tokens: Tensor) -> tuple[Tensor, ...]:
        """x (B, P, text_width) through a text layer; its queries, keys and attention probabilities."""
        layer = self.layers[number]
        normed = layer.attention_norm(x)
        k, v = layer.project(normed, normed)
        q, k = rotate(layer.queries(normed), cos, sin), rotate(k, cos, sin)
        attended, weights = attend(q, k, v, bias)
        return layer.finish(x, attended), q, k, weights

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`: text layers, then those over what they give; the first of these with the norms before it."""
        first, *others = numbered("adapter", self.adapter)
        last = ("cross", "state_in", "state_out")
        return ("embedding",), *numbered("layers", self.layers), ("norm", "adapter_norm", *first), *others, last

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; handed on are x (B, P, text_width) and the mask. Of a prefix from which nothing is left out; `forward`
        alone makes the others."""
        image_tokens, lang_tokens, lang_mask, state = inputs
        if number == 0:
            return self._begin(image_tokens, lang_tokens, lang_mask), ()
        x, mask = handed
        over = number - 1 - len(self.layers)
        if over < 0:
            return (self.read(number - 1, x, self.cos, self.sin, self.causal, image_tokens)[0], mask), ()
        if over == len(self.adapter):
            return tuple(self.end(x, mask * self.kinds, state)), ()
        x = self.adapter_norm(self.norm(x)) if over == 0 else x
        return (self.adapter[over](x, padding_bias(mask)), mask), ()

    def forward(
        self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        cache, _, looks = self._encode(image_tokens, lang_tokens, lang_mask, state)
        return tuple(cache) if self.store is None else self.store(*cache, looks)

    def encode(
        self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor
    ) -> tuple[PrefixCache, list[Tensor]]:
        """The cache, and each text layer's attention probabilities (B, H, P, P).

        Args:
            image_tokens: (B, cameras * N, image_width). lang_tokens, lang_mask: (B, L). state: (B, max_state_dim).
        """
        return self._encode(image_tokens, lang_tokens, lang_mask, state)[:2]

    def _encode(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor):
        """As `encode`, and (B, P) how much each token is looked at by the last layer over the language model, where `store`
        asks."""
        x, mask = self._begin(image_tokens, lang_tokens, lang_mask)
        cos, sin, kinds, probabilities = self.cos, self.sin, self.kinds, []
        for number in range(len(self.layers)):
            bias = self.in_order(self.causal, mask)
            x, q, k, weights = self.read(number, x, cos, sin, bias, image_tokens)
            probabilities.append(weights)
            if number == self.narrows_at:
                kept, mask = self.choose(q, k, bias, mask)
                x, cos, sin, kinds = (taken(tensor, kept, 1) for tensor in (x, cos, sin, kinds))
        x, bias, looks = self.adapter_norm(self.norm(x)), padding_bias(mask), mask
        for layer in self.adapter:
            if layer is self.adapter[-1] and self.store is not None and self.store.ranks:
                q, k = (split_heads(project(layer.attention_norm(x)), layer.head_dim) for project in (layer.q, layer.k))
                looks = attention_columns(q, k, bias, mask).mean(1)
            x = layer(x, bias)
        return self.end(x, mask * kinds, state), probabilities, looks

    def _begin(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the text layers read (B, P, text_width), and the mask (B, P)."""
        words = self.embedding(lang_tokens)
        told = lang_mask.to(words.dtype)[..., None]
        mask = self.with_pictures(told, told.new_ones(*image_tokens.shape[:2], 1))[..., 0]
        return self.with_pictures(words, self.words(image_tokens)), mask

    def end(self, x: Tensor, mask: Tensor, state: Tensor) -> PrefixCache:
        """What goes over to the diffusion transformer, of what the layers give; `mask` with the kinds of tokens."""
        keys, values = (torch.stack(parts) for parts in zip(*(cross.project(x, x) for cross in self.cross.values())))
        token = self.state_out(F.relu(self.state_in(state)))
        return PrefixCache(keys, values, mask, token[:, None])

    def with_pictures(self, told: Tensor, seen: Tensor) -> Tensor:
        """(B, L, D) and (B, cameras * N, D) -> (B, P, D)."""
        parts, begin, count = [], 0, self.config.image_tokens
        for camera, place in enumerate(self.config.image_places):
            parts += [told[:, begin:place], seen[:, camera * count : (camera + 1) * count]]
            begin = place + 1
        return torch.cat([*parts, told[:, begin:]], dim=1)


class TimeEncoder(nn.Module):
    """Flow time (B,), 1 for noise -> (B, 2 * layers + 3, width): scale and shift of the first norm of each layer, shift and
    scale of the last norm, and the time's share in the second layer of the action encoder."""

    def __init__(self, c: GrootConfig):
        super().__init__()
        self.buckets = c.time_buckets
        self.mlp_in, self.mlp_out = nn.Linear(TIME_CHANNELS, c.width), nn.Linear(c.width, c.width)
        self.norms = nn.ModuleList(nn.Linear(c.width, 2 * c.width) for _ in range(c.layers + 1))
        self.action = nn.Linear(c.width, c.width)
        # in the order of the original's arithmetic: at a thousand radians a rounding is seen
        half = torch.arange(TIME_CHANNELS // 2, dtype=torch.float32)
        self.register_buffer("rates", (-math.log(LONGEST) * half / (TIME_CHANNELS // 2 - 1)).exp(), persistent=False)
        half = -torch.arange(c.width // 2, dtype=torch.float32)
        rates = (half * (torch.tensor(LONGEST).log() / (c.width // 2))).exp()
        self.register_buffer("action_rates", rates, persistent=False)

    def forward(self, time: Tensor) -> tuple[Tensor]:
        # the original counts from noise to actions, in whole buckets
        bucket = torch.floor((1 - time) * self.buckets + 1e-2)[:, None]
        phase = bucket * self.rates
        condition = self.mlp_out(F.silu(self.mlp_in(torch.cat([phase.cos(), phase.sin()], dim=-1))))
        condition = F.silu(condition)
        phase = bucket * self.action_rates
        action = self.action(torch.cat([phase.sin(), phase.cos()], dim=-1))
        rows = [row for norm in self.norms for row in norm(condition).chunk(2, dim=-1)]
        return (torch.stack([*rows, action], dim=1),)


class CrossLayer(nn.Module):
    """A layer of the diffusion transformer that looks at the observation; its first norm is set by the flow time."""

    def __init__(self, c: GrootConfig):
        super().__init__()
        self.head_dim = c.width // c.layers_heads
        self.q, self.out = nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)
        self.mlp = MLP(c.width, c.layers_hidden)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """x (B, S, W); scale, shift (B, W); k, v (B, H, P, hd); bias additive, (B, 1, 1, P)."""
        return self.finish(x, attend(self.queries(modulated(x, scale, shift)), k, v, bias)[0])

    def queries(self, normed: Tensor) -> Tensor:
        """(B, S, W) -> (B, H, S, hd)."""
        return split_heads(self.q(normed), self.head_dim)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual, then the feed-forward half: (B, S, W)."""
        x = x + self.out(attended)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:], eps=DIT_EPS))


class OwnLayer(CrossLayer):
    """One that looks at its own tokens."""

    def __init__(self, c: GrootConfig):
        super().__init__(c)
        self.k, self.v = nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = modulated(x, scale, shift)
        k, v = (split_heads(project(normed), self.head_dim) for project in (self.k, self.v))
        return self.finish(x, attend(self.queries(normed), k, v)[0])

    def folds(self) -> tuple[Fold, ...]:
        """See `Fold`."""
        return (Fold(self.v, (self.out,)),)  # attention mixes tokens and never channels


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float = DIT_EPS) -> Tensor:
    """x (B, S, W) normalized (a layer norm without weights), scaled and shifted by (B, W)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


class ActionHead(Chain):
    """Noisy actions x (B, T, A) and the prefix cache as it crosses -> flow velocity (B, T, A), pointing at the noise."""

    def __init__(self, c: GrootConfig):
        super().__init__()
        self.chunk_size = c.chunk_size
        self.action_in = nn.Linear(c.max_action_dim, c.width)
        self.mlp_in = nn.Linear(c.width, c.width, bias=False)
        self.mlp_out = nn.Linear(c.width, c.width)
        self.places = nn.Parameter(torch.zeros(c.chunk_size, c.width)) if c.positions else None
        self.future = nn.Parameter(torch.zeros(c.future_tokens, c.width)) if c.future_tokens else None
        cross = c.cross_layers
        self.layers = nn.ModuleList((CrossLayer if i in cross else OwnLayer)(c) for i in range(c.layers))
        self.proj_out = nn.Linear(c.width, c.output_width)
        self.decoder = nn.Linear(c.output_width, c.decoder_hidden)
        self.action_out = nn.Linear(c.decoder_hidden, c.max_action_dim)
        self.load: nn.Module | None = None  # inverse of the prefix's `store`

    def looked_at(self, layer: int, mask: Tensor) -> Tensor:
        """What is added to the scores of a layer that looks at the observation, (B, 1, 1, P)."""
        return padding_bias(mask)

    def forward(self, x: Tensor, time_condition: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x, time_condition, *(cache if self.load is None else self.load(*cache)))

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        first = ("action_in", "mlp_in", "mlp_out", "places", "future")
        return first, *numbered("layers", self.layers), ("proj_out", "decoder", "action_out")

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; handed on are the tokens (B, S, width)."""
        x, times, keys, values, mask, state = inputs
        if number == 0:
            actions = self.mlp_out(F.silu(self.mlp_in(self.action_in(x)) + times[:, -1:]))
            if self.places is not None:
                actions = actions + self.places
            future = () if self.future is None else (self.future.expand(x.shape[0], -1, -1),)
            return (torch.cat([state, *future, actions], dim=1),), ()
        (h,), index = handed, number - 1
        if index < len(self.layers):
            seen = (keys[index // 2], values[index // 2], self.looked_at(index, mask)) if index % 2 == 0 else ()
            return (self.layers[index](h, times[:, 2 * index], times[:, 2 * index + 1], *seen),), ()
        # of the other tokens nothing is read any more; the last norm's shift comes first
        given = self.proj_out(modulated(h[:, -self.chunk_size :], times[:, -2], times[:, -TIME_ROWS], OUT_EPS))
        return (-self.action_out(F.relu(self.decoder(given))),), ()  # the original's velocity points at the actions


class Groot(nn.Module):
    """The whole policy, made of its stages."""

    matched = "velocity"
    PARTS: ClassVar = (VisionTower, PrefixEncoder, TimeEncoder, ActionHead)

    def __init__(self, config: GrootConfig):
        super().__init__()
        self.config = config
        self.vision, self.prefix, self.time, self.denoise = (part(config) for part in self.PARTS)

    @property
    def reader(self) -> Narrowing:
        """What reads pictures among words."""
        return self.prefix

    @property
    def cache_length(self) -> int:
        """Tokens whose keys and values every flow step reads."""
        return self.prefix.length

    def round_cache_(self, store: nn.Module, load: nn.Module) -> None:
        """Have the cache cross as `store` makes it, for which `load` is the inverse."""
        self.prefix.store, self.denoise.load = store, load

    def stages(self) -> tuple[Stage, ...]:
        """vision, prefix, time, denoise; batch 1, static shapes (see `policy.stages`)."""
        c = self.config
        kv = (len(c.cross_layers), 1, c.layers_heads, self.prefix.length, c.width // c.layers_heads)
        cache = (
            TensorSpec("observed_k", kv),
            TensorSpec("observed_v", kv),
            TensorSpec("prefix_mask", (1, self.prefix.length)),
            TensorSpec("state_token", (1, 1, c.width)),
        )
        if self.prefix.store is not None:
            cache = self.prefix.store.tensors(cache)
        observation = (
            TensorSpec("image_tokens", (1, c.cameras * c.image_tokens, c.image_width)),
            TensorSpec("lang_tokens", (1, c.language_length), "int64"),
            TensorSpec("lang_mask", (1, c.language_length), "bool"),
            TensorSpec("state", (1, c.max_state_dim)),
        )
        image = TensorSpec("image", (1, 3, *c.image_shape))
        tokens = TensorSpec("image_tokens", (1, c.image_tokens, c.image_width))
        condition = TensorSpec("time_condition", (1, 2 * c.layers + TIME_ROWS, c.width))
        actions = (1, c.chunk_size, c.max_action_dim)
        x, velocity = TensorSpec("x", actions), TensorSpec("velocity", actions)
        return (
            Stage("vision", self.vision, (image,), (tokens,)),
            Stage("prefix", self.prefix, observation, cache),
            Stage("time", self.time, (TensorSpec("time", (1,)),), (condition,)),
            Stage("denoise", self.denoise, (x, condition, *cache), (velocity,)),
        )
