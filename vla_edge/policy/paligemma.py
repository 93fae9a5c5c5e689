"""What pi0 and pi0.5 share: PaliGemma (Beyer et al., 2024, arXiv:2407.07726) reduced to the keys and values that an
action expert reads, and the stages of a flow policy on top of it.

SigLIP sees each picture, Gemma (2024, arXiv:2403.08295) reads pictures and instruction in both directions, and the
expert attends, layer by layer, to what Gemma's attention would be given. Nothing reads the last layer's output, so that
layer is its keys and values alone. Sizes come from the checkpoint. test/parity holds both policies to their originals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vla_edge.policy.blocks import (
    DecoderLayer,
    Fold,
    KeyValue,
    RMSNorm,
    SeeingTower,
    VisionTransformer,
    attend,
    padding_bias,
    rotary,
    rotate,
)
from vla_edge.policy.chain import numbered
from vla_edge.policy.narrow import Narrowing, taken
from vla_edge.policy.stages import Stage, TensorSpec

EPS = 1e-6
ACTIVATION = "gelu_tanh"


@dataclass(frozen=True)
class PiConfig:
    """Shapes of a pi0 or pi0.5.

    Attributes:
        image_size, patch_size: px.
        text_layers: also those of the expert.
    """

    cameras: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vocabulary: int
    text_width: int
    text_hidden: int
    text_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    expert_width: int
    expert_hidden: int
    chunk_size: int
    max_state_dim: int
    max_action_dim: int
    language_length: int
    min_period: float
    max_period: float

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix_length(self) -> int:
        """P: images and instruction."""
        return self.cameras * self.image_tokens + self.language_length


class PrefixCache(NamedTuple):
    """What the action expert needs of one observation (E layers, S tokens of the expert).

    Attributes:
        keys, values: (E, B, KVH, P, hd).
        mask: (B, P) 1 where a token is real.
        cos, sin: (B, S, hd / 2) rotary table of the expert's tokens, which follow the prefix.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor


class VisionTower(SeeingTower):
    """image (B, 3, H, W) in [-1, 1] -> image_tokens (B, N, text_width)."""

    WORDS = ("projector",)

    def __init__(self, c: PiConfig):
        super().__init__()
        self.encoder = VisionTransformer(
            c.image_size, c.patch_size, c.vision_width, c.vision_hidden, c.vision_layers, c.vision_heads, EPS
        )
        self.projector = nn.Linear(c.vision_width, c.text_width)

    def words(self, seen: Tensor) -> Tensor:
        return self.projector(seen)


class PrefixEncoder(Narrowing):
    """Image tokens and instruction -> the action expert's cache, once per observation.

    Args:
        suffix: tokens of the expert.
    """

    CACHE: ClassVar[type[NamedTuple]] = PrefixCache
    END: ClassVar[tuple[str, ...]] = ("last_norm", "last")  # what the last piece needs

    def __init__(self, c: PiConfig, suffix: int):
        super().__init__()
        self.config, self.suffix = c, suffix
        self.embedding = nn.Embedding(c.vocabulary, c.text_width)
        self.layers = nn.ModuleList(
            DecoderLayer(c.text_width, c.text_hidden, c.heads, c.kv_heads, c.head_dim, EPS, ACTIVATION)
            for _ in range(c.text_layers - 1)
        )
        self.last_norm = RMSNorm(c.text_width, EPS)
        self.last = KeyValue(c.text_width, c.kv_heads, c.head_dim)
        self.sees(range(c.cameras * c.image_tokens), c.prefix_length)

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        return ("embedding",), *numbered("layers", self.layers), self.END

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; rows are keys and values."""
        return self._through(number, handed, inputs)[:2]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encode(*inputs)[0])

    def encode(self, *inputs: Tensor) -> tuple[PrefixCache, list[Tensor]]:
        """The cache, and each layer's attention probabilities (B, H, P, P).

        Args:
            inputs: image_tokens (B, cameras * N, text_width), lang_tokens and lang_mask (B, L), and the state
                (B, max_state_dim), which not every prefix reads.
        """
        handed, cache, probabilities = (), [], []
        for number in range(len(self.pieces())):
            handed, rows, looks = self._through(number, handed, inputs)
            handed, cache = self.narrowed(number, handed, [*cache, rows] if rows else cache)
            probabilities += looks
        keys, values = (torch.stack(tensors) for tensors in zip(*cache))
        return self.CACHE(keys, values, *handed), probabilities

    def _through(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence):
        """As `piece`, and the attention probabilities, one of a whole layer."""
        if number == 0:
            return self._begin(*inputs[:3]), (), ()
        x, mask, suffix, bias, cos, sin = handed
        whole = number <= len(self.layers)
        layer = self.layers[number - 1] if whole else self.last
        normed = (layer.attention_norm if whole else self.last_norm)(x)
        k, v = layer.project(normed, normed)
        k = rotate(k, cos, sin)
        if not whole:
            return self._end(mask, suffix, inputs), (k, v), ()
        q = rotate(layer.queries(normed), cos, sin)
        attended, looks = attend(q, k, v, bias)
        x = layer.finish(x, attended)
        if number - 1 != self.narrows_at:
            return (x, mask, suffix, bias, cos, sin), (k, v), (looks,)
        kept, mask = self.choose(q, k, bias, mask)
        x, cos, sin = (taken(tensor, kept, 1) for tensor in (x, cos, sin))
        return (kept, x, mask, suffix, padding_bias(mask), cos, sin), (k, v), (looks,)

    def _begin(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor) -> tuple[Tensor, ...]:
        """x (B, P, text_width), which tokens are real, places of the expert's tokens, and the attention's bias and rotary
        table."""
        c = self.config
        x = torch.cat([image_tokens, self.embedding(lang_tokens) * math.sqrt(c.text_width)], dim=1)
        real = x.new_ones(x.shape[0], image_tokens.shape[1])
        mask = torch.cat([real, lang_mask.to(x.dtype)], dim=1)
        suffix = mask.sum(1, keepdim=True) + torch.arange(self.suffix, device=mask.device)
        return (x, mask, suffix, padding_bias(mask), *rotary(mask.cumsum(1) - 1, c.head_dim))

    def _end(self, mask: Tensor, suffix: Tensor, inputs: Sequence) -> tuple[Tensor, ...]:
        """The cache but for its rows."""
        return (mask, *rotary(suffix, self.config.head_dim))

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.last_norm, (self.last.k, self.last.v)),)


class PiPolicy(nn.Module):
    """A flow policy on PaliGemma, made of its stages.

    Args:
        condition: shape of what `time` gives to `denoise`.
        reads, gives: what `prefix` reads and gives besides what `PrefixEncoder` does.
    """

    matched = "velocity"

    def __init__(
        self,
        config: PiConfig,
        prefix: PrefixEncoder,
        time: nn.Module,
        denoise: nn.Module,
        condition: tuple[int, ...],
        reads: tuple[TensorSpec, ...] = (),
        gives: tuple[TensorSpec, ...] = (),
    ):
        super().__init__()
        self.config = config
        self.vision, self.prefix, self.time, self.denoise = VisionTower(config), prefix, time, denoise
        self._condition, self._reads, self._gives = TensorSpec("time_condition", condition), reads, gives

    @property
    def reader(self) -> Narrowing:
        """What reads pictures among words."""
        return self.prefix

    def stages(self) -> tuple[Stage, ...]:
        """vision, prefix, time, denoise; batch 1, static shapes (see `policy.stages`)."""
        c = self.config
        kv = (c.text_layers, 1, c.kv_heads, self.prefix.length, c.head_dim)
        rope = (1, self.prefix.suffix, c.head_dim // 2)
        cache = (
            TensorSpec("prefix_keys", kv),
            TensorSpec("prefix_values", kv),
            TensorSpec("prefix_mask", (1, self.prefix.length)),
            TensorSpec("rope_cos", rope),
            TensorSpec("rope_sin", rope),
            *self._gives,
        )
        observation = (
            TensorSpec("image_tokens", (1, c.cameras * c.image_tokens, c.text_width)),
            TensorSpec("lang_tokens", (1, c.language_length), "int64"),
            TensorSpec("lang_mask", (1, c.language_length), "bool"),
            *self._reads,
        )
        image = TensorSpec("image", (1, 3, c.image_size, c.image_size))
        tokens = TensorSpec("image_tokens", (1, c.image_tokens, c.text_width))
        actions = (1, c.chunk_size, c.max_action_dim)
        x, velocity = TensorSpec("x", actions), TensorSpec("velocity", actions)
        return (
            Stage("vision", self.vision, (image,), (tokens,)),
            Stage("prefix", self.prefix, observation, cache),
            Stage("time", self.time, (TensorSpec("time", (1,)),), (self._condition,)),
            Stage("denoise", self.denoise, (x, self._condition, *cache), (velocity,)),
        )
