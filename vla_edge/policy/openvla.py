"""OpenVLA (Kim et al., 2024, arXiv:2406.09246) and OpenVLA-OFT (Kim et al., 2025, arXiv:2502.19645).

DINOv2 and SigLIP see the same picture, their features side by side are projected to words, and Llama reads the first
word, the pictures and the rest of the prompt. OpenVLA then writes its action as tokens, one of 256 bins each: `prefill`
reads the prompt into a cache of static size, `decode` reads that and the few tokens behind it. Only tokens of actions
are ever scored, so the head has 256 rows and the words that are fed back are those 256. OFT reads all places of a whole
chunk in one pass, looking in both directions, and a small network makes numbers of what it finds there: one stage,
`act`.

Padding follows the prompt, and in the cache a token's place is its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vla_edge.policy.bins import BINS, bin_values
from vla_edge.policy.blocks import (
    ACTIVATIONS,
    MASKED,
    DecoderLayer,
    Fold,
    RMSNorm,
    VisionTransformer,
    attend,
    attend_cached,
    attention_columns,
    rotary,
    rotate,
)
from vla_edge.policy.chain import Chain, numbered
from vla_edge.policy.stages import Stage, TensorSpec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VISION_EPS = 1e-6
STOP = 2  # Llama's end of a sentence


@dataclass(frozen=True)
class TowerConfig:
    """Shapes of one vision transformer.

    Attributes:
        layers: that are run; the last of the original is not.
        mean, std: per channel, by which pixels in [0, 1] are scaled for it.
    """

    patch_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    registers: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class OpenVLAConfig:
    """Shapes of an OpenVLA.

    Attributes:
        towers: whose features lie side by side.
        projector: widths of the projector's layers between the features and the words.
        action_dim: A values of an action. chunk_size: T actions.
        head_hidden, head_blocks: of OFT's head; 0 where actions are tokens.
        proprio_dim: values of the state that are read, 0 where none is.
    """

    cameras: int
    image_size: int
    towers: tuple[TowerConfig, ...]
    projector: tuple[int, ...]
    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    eps: float
    wavelength: float
    language_length: int
    action_dim: int
    chunk_size: int
    head_hidden: int = 0
    head_blocks: int = 0
    proprio_dim: int = 0

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera."""
        return (self.image_size // self.towers[0].patch_size) ** 2

    @property
    def prompt_length(self) -> int:
        """P: pictures, state and prompt."""
        return self.cameras * self.image_tokens + self.language_length + bool(self.proprio_dim)

    @property
    def tokens(self) -> int:
        """Places of one chunk."""
        return self.chunk_size * self.action_dim


class VisionTower(Chain):
    """image (B, 3, H, W) in [-1, 1] -> image_tokens (B, N, width)."""

    def __init__(self, c: OpenVLAConfig):
        super().__init__()
        self.encoders = nn.ModuleList(
            VisionTransformer(
                c.image_size, t.patch_size, t.width, t.hidden, t.layers, t.heads, VISION_EPS, "gelu", t.registers, False
            )
            for t in c.towers
        )
        widths = (sum(t.width for t in c.towers), *c.projector, c.width)
        self.projector = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:]))
        for index, tower in enumerate(c.towers):
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (tower.mean, tower.std))
            # pixels come as 2 x - 1 of x in [0, 1]
            self.register_buffer(f"scale{index}", 0.5 / std, persistent=False)
            self.register_buffer(f"shift{index}", (0.5 - mean) / std, persistent=False)

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`: the encoders' layers one after the other."""
        parts = [encoder.parts(f"encoders.{i}") for i, encoder in enumerate(self.encoders)]
        first, last = (sum((part[place] for part in parts), ()) for place in (0, -1))
        return first, *(layer for part in parts for layer in part[1:-1]), (*last, "projector")

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; handed on is what each encoder has seen so far."""
        if number == 0:
            (image,) = inputs
            views = (image * getattr(self, f"scale{i}") + getattr(self, f"shift{i}") for i in range(len(self.encoders)))
            return tuple(encoder.embed(view) for encoder, view in zip(self.encoders, views)), ()
        place = number - 1
        for index, encoder in enumerate(self.encoders):
            if place < len(encoder.layers):
                return (*handed[:index], encoder.layers[place](handed[index]), *handed[index + 1 :]), ()
            place -= len(encoder.layers)
        x = torch.cat([encoder.finish(seen) for encoder, seen in zip(self.encoders, handed)], dim=-1)
        for index, layer in enumerate(self.projector):
            x = layer(x if index == 0 else ACTIVATIONS["gelu"](x))
        return (x,), ()


class Reader(Chain):
    """Llama's layers, and its norm: what all stages that read share.

    Handed from layer to layer are x (B, T, width), the rotary table of its places, and what else a stage keeps for its end.
    """

    BEGIN: ClassVar[tuple[str, ...]]  # what the first piece needs

    def __init__(self, c: OpenVLAConfig):
        super().__init__()
        self.config = c
        self.head_dim = c.head_dim
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(
            DecoderLayer(c.width, c.hidden, c.heads, c.kv_heads, self.head_dim, c.eps) for _ in range(c.layers)
        )
        self.norm = RMSNorm(c.width, c.eps)

    def prompt(self, image_tokens: Tensor, lang_tokens: Tensor) -> Tensor:
        """The first word, what comes from cameras and state, and the rest of the words: (B, P, width)."""
        words = self.embedding(lang_tokens)
        return torch.cat([words[:, :1], image_tokens, words[:, 1:]], dim=1)

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        return self.BEGIN, *numbered("layers", self.layers), ("norm", "head")


def through(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """x (B, T, width) through one layer; its queries, keys and values; its attention probabilities (B, H, T, T)."""
    normed = layer.attention_norm(x)
    k, v = layer.project(normed, normed)
    q, k = rotate(layer.queries(normed), cos, sin), rotate(k, cos, sin)
    attended, probabilities = attend(q, k, v, bias)
    return layer.finish(x, attended), q, k, v, probabilities


class Prefill(Reader):
    """Prompt -> scores of the first token, where it will stand, and the cache: keys and values of every place of the prompt
    and which of them are real."""

    BEGIN = ("embedding",)

    def __init__(self, c: OpenVLAConfig):
        super().__init__(c)
        self.head = nn.Linear(c.width, BINS, bias=False)
        causal = torch.triu(torch.full((c.prompt_length, c.prompt_length), MASKED), diagonal=1)
        self.register_buffer("causal", causal[None, None], persistent=False)
        self.store: nn.Module | None = None  # the cache crosses as it is

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; rows are keys and values. Handed on to the end are where the first token will stand, which places are
        real, and, for a store, how much each is looked at."""
        if number == 0:
            image_tokens, lang_tokens, lang_mask = inputs
            x = self.prompt(image_tokens, lang_tokens)
            places = torch.arange(self.config.prompt_length, device=x.device)[None]
            position = image_tokens.shape[1] + lang_mask.to(torch.int64).sum(1)
            mask = (places < position).to(x.dtype)
            # padding comes last, in order on every runtime
            looks = [] if self.store is None else [(mask - 1) * places]
            return (x, *rotary(places, self.head_dim, self.config.wavelength), position, mask, *looks), ()
        x, cos, sin, position, mask, *looks = handed
        if number <= len(self.layers):
            x, q, k, v, _ = through(self.layers[number - 1], x, cos, sin, self.causal)
            if self.store is not None and self.store.ranks:
                words = slice(1 - self.config.language_length, None)
                seen = attention_columns(q[:, :, words], k, self.causal[:, :, words], mask[:, words])
                looks = [looks[0] + seen.mean(1)]
            return (x, cos, sin, position, mask, *looks), (k, v)
        last = x.index_select(1, position - 1)
        return (self.head(self.norm(last))[:, 0], position, mask, *looks), ()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, position, mask, *looks, keys, values = super().forward(*inputs)
        cache = (keys, values, mask) if self.store is None else self.store(keys, values, mask, *looks)
        return (scores, position, *cache)

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.norm, (self.head,)),)


class Decode(Chain):
    """One token, counted among the 256 of actions, the `step`th behind the prompt, whose cache it reads, and that of the
    tokens between (`tail`) -> scores of the next, and its own keys and values.

    `position` is where the first of them stands.
    """

    def __init__(self, prefill: Prefill):
        super().__init__()
        c = self.config = prefill.config
        self.head_dim = prefill.head_dim
        self.layers, self.norm, self.head = prefill.layers, prefill.norm, prefill.head
        self.words = nn.Embedding(BINS, c.width)
        self.register_buffer("places", torch.arange(c.tokens), persistent=False)
        self.load: nn.Module | None = None  # inverse of the `store` of `prefill`

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        return ("words",), *numbered("layers", self.layers), ("norm", "head")

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; rows are the token's keys and values."""
        token, step, position, tail_keys, tail_values, keys, values, mask = inputs
        if number == 0:
            bias = ((1 - mask) * MASKED)[:, None, None]
            # behind the places of the tail, the token itself
            there = (self.places < step) | (self.places == self.config.tokens - 1)
            tail_bias = (~there).to(mask.dtype)[None] * MASKED
            rope = rotary((position + step)[None], self.head_dim, self.config.wavelength)
            return (self.words(token), *rope, bias, tail_bias), ()
        x, cos, sin, bias, tail_bias = handed
        index = number - 1
        if index == len(self.layers):
            return (self.head(self.norm(x))[:, 0],), ()
        layer = self.layers[index]
        normed = layer.attention_norm(x)
        k, v = layer.project(normed, normed)
        q, k = rotate(layer.queries(normed), cos, sin), rotate(k, cos, sin)
        own = torch.cat([tail_keys[index], k], dim=2), torch.cat([tail_values[index], v], dim=2)
        x = layer.finish(x, attend_cached(q, keys[index], values[index], *own, bias, tail_bias))
        return (x, cos, sin, bias, tail_bias), (k, v)

    def forward(
        self, token: Tensor, step: Tensor, position: Tensor, tail_keys: Tensor, tail_values: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        cache = cache if self.load is None else self.load(*cache)
        return super().forward(token, step, position, tail_keys, tail_values, *cache)

    folds = Prefill.folds  # of the very same norm: a graph traced once has to take what a recipe makes of it


class Revise(nn.Module):
    """All tokens but the last, guessed, from `position` on -> scores of each one's successor: a pass of fixed-point decoding
    (Santilli et al., 2023, arXiv:2305.10427)."""

    def __init__(self, decode: Decode):
        super().__init__()
        c = self.config = decode.config
        self.head_dim = decode.head_dim
        self.layers, self.norm, self.head, self.words = decode.layers, decode.norm, decode.head, decode.words
        rows = c.tokens - 1
        self.register_buffer("rows", torch.arange(rows), persistent=False)
        self.register_buffer("causal", torch.triu(torch.full((rows, rows), MASKED), diagonal=1), persistent=False)
        self.load: nn.Module | None = None  # inverse of the `store` of `prefill`

    def forward(self, tokens: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor]:
        keys, values, mask = cache if self.load is None else self.load(*cache)
        cos, sin = rotary((position + self.rows)[None], self.head_dim, self.config.wavelength)
        x = self.words(tokens)
        bias = ((1 - mask) * MASKED)[:, None, None]
        for index, layer in enumerate(self.layers):
            normed = layer.attention_norm(x)
            k, v = layer.project(normed, normed)
            q = rotate(layer.queries(normed), cos, sin)
            own = rotate(k, cos, sin), v
            x = layer.finish(x, attend_cached(q, keys[index], values[index], *own, bias, self.causal))
        return (self.head(self.norm(x)),)

    folds = Prefill.folds


class Generate(nn.Module):
    """Prompt -> scores (1, T * A, 256) of every token of a chunk, each after the likeliest ones before it."""

    def __init__(self, prefill: Prefill, decode: Decode):
        super().__init__()
        self.prefill, self.decode = prefill, decode

    def forward(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor) -> tuple[Tensor]:
        c = self.prefill.config
        scores, position, *cache = self.prefill(image_tokens, lang_tokens, lang_mask)
        found = [scores]
        keys, values = scores.new_zeros(2, c.layers, 1, c.kv_heads, c.tokens - 1, c.head_dim)
        for step in range(c.tokens - 1):
            token = scores.argmax(-1, keepdim=True)
            scores, new_keys, new_values = self.decode(token, torch.tensor([step]), position, keys, values, *cache)
            here = (self.decode.places[:-1] == step)[:, None]
            keys, values = torch.where(here, new_keys, keys), torch.where(here, new_values, values)
            found.append(scores)
        return (torch.stack(found, dim=1),)


class ResidualBlock(nn.Module):
    """Norm, linear layer, ReLU, and what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).relu()

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.norm, (self.linear,)),)


class ActionHead(nn.Module):
    """What was found at the A places of an action (B, T, A * width) -> the action (B, T, A)."""

    def __init__(self, c: OpenVLAConfig):
        super().__init__()
        wide = c.width * c.action_dim
        self.norm_in, self.linear_in = nn.LayerNorm(wide), nn.Linear(wide, c.head_hidden)
        self.blocks = nn.ModuleList(ResidualBlock(c.head_hidden) for _ in range(c.head_blocks))
        self.norm_out, self.linear_out = nn.LayerNorm(c.head_hidden), nn.Linear(c.head_hidden, c.action_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_in(self.norm_in(x)).relu()
        for block in self.blocks:
            x = block(x)
        return self.linear_out(self.norm_out(x))

    def folds(self) -> tuple[Fold, ...]:
        return Fold(self.norm_in, (self.linear_in,)), Fold(self.norm_out, (self.linear_out,))


class Act(Reader):
    """Prompt (and state) -> the whole chunk at once (B, T, A), normalized."""

    BEGIN = ("embedding", "state_in", "state_out")

    def __init__(self, c: OpenVLAConfig):
        super().__init__(c)
        self.head = ActionHead(c)
        self.state_in = nn.Linear(c.proprio_dim, c.width) if c.proprio_dim else None
        self.state_out = nn.Linear(c.width, c.width) if c.proprio_dim else None

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`."""
        if number == 0:
            x, mask, last = self.places(*inputs)
            rope = rotary(mask.cumsum(1) - 1, self.head_dim, self.config.wavelength)
            return (x, *rope, ((1 - mask) * MASKED)[:, None, None, :], last), ()
        x, cos, sin, bias, last = handed
        if number <= len(self.layers):
            return (through(self.layers[number - 1], x, cos, sin, bias)[0], cos, sin, bias, last), ()
        return (self.actions(torch.cat([x.index_select(1, last), x[:, self.config.prompt_length : -2]], dim=1)),), ()

    def places(
        self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Everything that is read (B, P + T * A + 1, width), a mask of what of it is real, and the place (B,) of the
        last word. Each value is told by the place before its own, as if it were the next word."""
        c = self.config
        if self.state_in is not None:
            token = self.state_out(ACTIVATIONS["gelu"](self.state_in(state)))
            image_tokens = torch.cat([image_tokens, token[:, None]], dim=1)
        x = self.prompt(image_tokens, lang_tokens)
        # the places of actions are empty, and the end of the sentence closes them
        end = self.embedding(torch.full((x.shape[0], 1), STOP, dtype=torch.int64, device=x.device))
        x = torch.cat([x, x.new_zeros(x.shape[0], c.tokens, c.width), end], dim=1)
        real = x.new_ones(x.shape[0], image_tokens.shape[1])
        words = lang_mask.to(x.dtype)
        rest = x.new_ones(x.shape[0], c.tokens + 1)
        mask = torch.cat([words[:, :1], real, words[:, 1:], rest], dim=1)
        return x, mask, image_tokens.shape[1] + lang_mask.to(torch.int64).sum(1) - 1

    def actions(self, found: Tensor) -> Tensor:
        """What was found at the places that tell (B, T * A, width) -> normalized actions (B, T, A)."""
        c = self.config
        return self.head(self.norm(found).reshape(-1, c.chunk_size, c.action_dim * c.width))


class OpenVLA(nn.Module):
    """The whole policy, made of its stages."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        if config.head_hidden:
            self.act = Act(config)
        else:
            self.prefill = Prefill(config)
            self.decode = Decode(self.prefill)
        self.revise: Revise | None = None  # decodes in the place of `decode`
        self.generates = False  # one stage reads the prompt and writes all tokens

    @property
    def can_revise(self) -> bool:
        """Whether there are tokens, one after the other, to be guessed and revised together."""
        return not self.config.head_hidden and self.config.tokens > 2

    @property
    def matched(self) -> str:
        """See `stages.StagedPolicy`."""
        return "actions" if self.config.head_hidden else "scores"

    @property
    def can_generate(self) -> bool:
        """Whether one stage can write all tokens: a recipe has not changed how they are written."""
        return not self.config.head_hidden and self.revise is None and self.prefill.store is None

    def revise_(self) -> None:
        """From now on all tokens are guessed and revised together."""
        self.revise = Revise(self.decode)

    @property
    def cache_length(self) -> int:
        """Tokens whose keys and values every token of the chunk reads; 0 where the chunk is read at once."""
        return 0 if self.config.head_hidden else self.config.prompt_length

    def round_cache_(self, store: nn.Module, load: nn.Module) -> None:
        """Have the prompt's cache cross as `store` makes it, for which `load` is the inverse."""
        self.prefill.store = store
        for reader in (self.decode, self.revise):
            if reader is not None:
                reader.load = load

    def chunk(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor) -> Tensor:
        """Normalized actions (1, T, A), differentiable: of tokens the mean of the bins by their probabilities, each
        after the tokens that were chosen before it."""
        c = self.config
        if c.head_hidden:
            return self.act(image_tokens, lang_tokens, lang_mask, state[:, : c.proprio_dim])[0]
        scores = self.greedy(image_tokens, lang_tokens, lang_mask)
        means = scores.softmax(-1) @ torch.as_tensor(bin_values(), dtype=scores.dtype)
        return means.reshape(1, c.chunk_size, c.action_dim)

    def greedy(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor) -> Tensor:
        """Scores (1, T * A, 256) of all tokens of one observation, each after the likeliest tokens before it."""
        return Generate(self.prefill, self.decode)(image_tokens, lang_tokens, lang_mask)[0]

    def say(self, *observed: Tensor, **asked):
        """For training, see `openvla_training.say`."""
        from vla_edge.policy.openvla_training import say

        return say(self, *observed, **asked)

    def stages(self) -> tuple[Stage, ...]:
        """vision, then prefill and decode, or generate, or act; batch 1, static shapes (see `policy.stages`)."""
        c = self.config
        image = TensorSpec("image", (1, 3, c.image_size, c.image_size))
        tokens = TensorSpec("image_tokens", (1, c.image_tokens, c.width))
        vision = Stage("vision", self.vision, (image,), (tokens,))
        prompt = (
            TensorSpec("image_tokens", (1, c.cameras * c.image_tokens, c.width)),
            TensorSpec("lang_tokens", (1, c.language_length), "int64"),
            TensorSpec("lang_mask", (1, c.language_length), "bool"),
        )
        if c.head_hidden:
            state = (TensorSpec("state", (1, c.proprio_dim)),) if c.proprio_dim else ()
            actions = TensorSpec("actions", (1, c.chunk_size, c.action_dim))
            return vision, Stage("act", self.act, (*prompt, *state), (actions,))
        kv = (c.layers, 1, c.kv_heads)

        def pair(name: str, tokens: int) -> tuple[TensorSpec, TensorSpec]:
            return tuple(TensorSpec(f"{name}_{kind}", (*kv, tokens, c.head_dim)) for kind in ("keys", "values"))

        step, position = TensorSpec("step", (1,), "int64"), TensorSpec("position", (1,), "int64")
        cache = (*pair("cache", c.prompt_length), TensorSpec("cache_mask", (1, c.prompt_length)))
        if self.prefill.store is not None:
            cache = self.prefill.store.tensors(cache)
        scores, token = TensorSpec("scores", (1, BINS)), TensorSpec("token", (1, 1), "int64")
        if self.generates:
            every = TensorSpec("token_scores", (1, c.tokens, BINS))
            module = Generate(self.prefill, self.decode)
            return vision, Stage("generate", module, prompt, (every,), shares="prefill")
        prefill = Stage("prefill", self.prefill, prompt, (scores, position, *cache))
        if self.revise is not None:
            rows = c.tokens - 1
            guessed, revised = TensorSpec("tokens", (1, rows), "int64"), TensorSpec("row_scores", (1, rows, BINS))
            return (
                vision,
                prefill,
                Stage("revise", self.revise, (guessed, position, *cache), (revised,), shares="prefill"),
            )
        return (
            vision,
            prefill,
            Stage(
                "decode", self.decode, (token, step, position, *pair("tail", c.tokens - 1), *cache),
                (scores, *pair("new", 1)), shares="prefill",
            ),
        )  # fmt: skip
