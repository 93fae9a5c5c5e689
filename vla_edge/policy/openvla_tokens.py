"""Stages of an OpenVLA that writes its actions as tokens: what reads the prompt, and what decodes.

`Prefill` reads the prompt into a cache of static size, at once or, as `BlockPrefill`, a block of places at a time; `Decode`
reads that cache and the tokens behind it, one or a window of them; `Revise` reads all tokens of a chunk, guessed. All are
the same layers. Only tokens of actions are ever scored, so the head has 256 rows and the words that are fed back are
those 256.

Padding follows the prompt, and in the cache a token's place is its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from vla_edge.policy.bins import BINS
from vla_edge.policy.blocks import (
    MASKED,
    DecoderLayer,
    Fold,
    RMSNorm,
    attend,
    attend_cached,
    attention_columns,
    causal_bias,
    padding_bias,
    rotary,
    rotate,
)
from vla_edge.policy.chain import Chain, numbered
from vla_edge.policy.narrow import Narrowing, taken

if TYPE_CHECKING:
    from vla_edge.policy.openvla import OpenVLAConfig


class Reader(Narrowing):
    """Llama's layers, and its norm: what all stages that read share.

    Handed from layer to layer are x (B, T, width), the rotary table of its places, and what else a stage keeps for its end.
    """

    BEGIN: ClassVar[tuple[str, ...]]  # what the first piece needs

    def __init__(self, c: OpenVLAConfig, behind: int = 0):
        """Args:
            behind: tokens behind the prompt that are read with it.
        """
        super().__init__()
        self.config = c
        self.head_dim = c.head_dim
        self.sees(range(1, 1 + c.cameras * c.image_tokens), c.prompt_length + behind)
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
    and which of them are real; and what the scores were made of, where a draft is to have it (`tells`)."""

    BEGIN = ("embedding",)

    def __init__(self, c: OpenVLAConfig):
        super().__init__(c)
        self.head = nn.Linear(c.width, BINS, bias=False)
        self.register_buffer("causal", causal_bias(c.prompt_length)[None, None], persistent=False)
        self.store: nn.Module | None = None  # the cache crosses as it is
        self.tells = False

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Narrowing`; rows are keys and values. Handed on to the end are where the first token will stand, which places are
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
            bias = self.in_order(self.causal, mask)
            x, q, k, v, _ = through(self.layers[number - 1], x, cos, sin, bias)
            if self.store is not None and self.store.ranks:
                words = slice(1 - self.config.language_length, None)
                seen = attention_columns(q[:, :, words], k, bias[:, :, words], mask[:, words])
                looks = [looks[0] + seen.mean(1)]
            if number - 1 != self.narrows_at:
                return (x, cos, sin, position, mask, *looks), (k, v)
            kept, mask = self.choose(q, k, bias, mask)
            x, cos, sin, *looks = (taken(tensor, kept, 1) for tensor in (x, cos, sin, *looks))
            return (kept, x, cos, sin, position, mask, *looks), (k, v)
        return (*self.told(x.index_select(1, position - self.left_out - 1)), position, mask, *looks), ()

    def told(self, last: Tensor) -> tuple[Tensor, ...]:
        """The place (1, 1, width) before the first token -> that token's scores (1, 256), and, where it `tells`, what they
        were made of (1, width)."""
        feature = self.norm(last)
        return (self.head(feature)[:, 0], *((feature[:, 0],) if self.tells else ()))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        scores, *others, keys, values = super().forward(*inputs)
        feature = [others.pop(0)] if self.tells else []
        position, mask, *looks = others
        cache = (keys, values, mask) if self.store is None else self.store(keys, values, mask, *looks)
        return (scores, *feature, position, *cache)

    def folds(self) -> tuple[Fold, ...]:
        """None where the norm's channels leave the stage."""
        return () if self.tells else (Fold(self.norm, (self.head,)),)


class BlockPrefill(Reader):
    """`Prefill`, of which a call reads `block` places of the prompt from place `begin` on, behind those that are in the cache
    already (chunked prefill, Agrawal et al., 2023, arXiv:2308.16369): no tensor between layers is longer than a block.

    Its keys and values are those of the block. The scores are right when the block holds the last word.
    """

    BEGIN, tells = Prefill.BEGIN, False

    def __init__(self, prefill: Prefill, block: int):
        Narrowing.__init__(self)
        self.sees(range(1, 1 + len(prefill.image_places)), prefill.tokens)
        self.config, self.head_dim, self.block, self.tells = prefill.config, prefill.head_dim, block, prefill.tells
        self.embedding, self.layers, self.norm, self.head = prefill.embedding, prefill.layers, prefill.norm, prefill.head
        self.register_buffer("causal", prefill.causal[0, 0, :block, :block].clone(), persistent=False)
        self.store: nn.Module | None = None

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; rows are keys and values of the block."""
        image_tokens, lang_tokens, lang_mask, begin, keys, values = inputs
        if number == 0:
            rows = begin + torch.arange(self.block, device=begin.device)
            x = self.prompt(image_tokens, lang_tokens).index_select(1, rows)
            places = torch.arange(self.config.prompt_length, device=begin.device)[None]
            position = image_tokens.shape[1] + lang_mask.to(torch.int64).sum(1)
            bias = padding_bias((places < begin).to(x.dtype))
            # nothing where the last word is in another block
            last = (rows == position - 1).to(x.dtype)[None, None]
            rope = rotary(rows[None], self.head_dim, self.config.wavelength)
            return (x, *rope, bias, last, position, (places < position).to(x.dtype)), ()
        x, cos, sin, bias, last, position, mask = handed
        index = number - 1
        if index == len(self.layers):
            return (*self.told(last @ x), position, mask), ()
        layer = self.layers[index]
        normed = layer.attention_norm(x)
        k, v = layer.project(normed, normed)
        q, k = rotate(layer.queries(normed), cos, sin), rotate(k, cos, sin)
        x = layer.finish(x, attend_cached(q, keys[index], values[index], k, v, bias, self.causal))
        return (x, cos, sin, bias, last, position, mask), (k, v)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *told, position, mask, keys, values = super().forward(*inputs)
        return (*told, position, keys, values, mask)

    told, folds = Prefill.told, Prefill.folds


class Decode(Chain):
    """A window of R tokens, counted among the 256 of actions, of which the first is the `step`th behind the prompt; they read
    the prompt's cache, that of the tokens between (`tail`), and those before them in the window -> scores of each one's
    successor, for a draft what they were made of, and their own keys and values.

    `position` is where the first token behind the prompt stands. With R = 1 this is greedy decoding's step. With more, all
    but the first are a draft's proposals, and one pass tells which of them greedy decoding would have chosen
    (Leviathan et al., 2023, arXiv:2211.17192).

    Args:
        rows: R. words: of another window's; new ones when None.
    """

    def __init__(self, prefill: Prefill, rows: int = 1, words: nn.Embedding | None = None):
        super().__init__()
        c = self.config = prefill.config
        self.head_dim, self.rows, self.tells = prefill.head_dim, rows, prefill.tells and rows > 1
        self.layers, self.norm, self.head = prefill.layers, prefill.norm, prefill.head
        self.words = nn.Embedding(BINS, c.width) if words is None else words
        self.register_buffer("places", torch.arange(c.tokens - 1), persistent=False)
        self.register_buffer("causal", causal_bias(rows), persistent=False)
        self.load: nn.Module | None = None  # inverse of the `store` of `prefill`

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        return ("words",), *numbered("layers", self.layers), ("norm", "head")

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; rows are the tokens' keys and values."""
        tokens, step, position, tail_keys, tail_values, keys, values, mask = inputs
        if number == 0:
            bias = padding_bias(mask)
            tail_bias = (1 - (self.places < step).to(mask.dtype))[None].expand(self.rows, -1) * MASKED
            own = torch.arange(self.rows, device=step.device)
            rope = rotary((position + step + own)[None], self.head_dim, self.config.wavelength)
            return (self.words(tokens), *rope, bias, torch.cat([tail_bias, self.causal], dim=1)), ()
        x, cos, sin, bias, own_bias = handed
        index = number - 1
        if index == len(self.layers):
            feature = self.norm(x)
            scores = self.head(feature)
            if self.rows == 1:
                return (scores[:, 0],), ()
            return (scores, *((feature,) if self.tells else ())), ()
        layer = self.layers[index]
        normed = layer.attention_norm(x)
        k, v = layer.project(normed, normed)
        q, k = rotate(layer.queries(normed), cos, sin), rotate(k, cos, sin)
        own = torch.cat([tail_keys[index], k], dim=2), torch.cat([tail_values[index], v], dim=2)
        x = layer.finish(x, attend_cached(q, keys[index], values[index], *own, bias, own_bias))
        return (x, cos, sin, bias, own_bias), (k, v)

    def forward(
        self, tokens: Tensor, step: Tensor, position: Tensor, tail_keys: Tensor, tail_values: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        cache = cache if self.load is None else self.load(*cache)
        return super().forward(tokens, step, position, tail_keys, tail_values, *cache)

    folds = Prefill.folds  # of the very same norm: a graph traced once has to take what a recipe makes of it


class Revise(nn.Module):
    """All tokens but the last, guessed, from `position` on -> scores of each one's successor: a pass of fixed-point decoding
    (Santilli et al., 2023, arXiv:2305.10427)."""

    def __init__(self, decode: Decode):
        super().__init__()
        c = self.config = decode.config
        self.head_dim, self.tells = decode.head_dim, decode.tells
        self.layers, self.norm, self.head, self.words = decode.layers, decode.norm, decode.head, decode.words
        rows = c.tokens - 1
        self.register_buffer("rows", torch.arange(rows), persistent=False)
        self.register_buffer("causal", causal_bias(rows), persistent=False)
        self.load: nn.Module | None = None  # inverse of the `store` of `prefill`

    def forward(self, tokens: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor]:
        keys, values, mask = cache if self.load is None else self.load(*cache)
        cos, sin = rotary((position + self.rows)[None], self.head_dim, self.config.wavelength)
        x = self.words(tokens)
        bias = padding_bias(mask)
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
        scores, *others = self.prefill(image_tokens, lang_tokens, lang_mask)
        position, *cache = others[self.prefill.tells :]
        found = [scores]
        keys, values = scores.new_zeros(2, c.layers, 1, c.kv_heads, c.tokens - 1, c.head_dim)
        for step in range(c.tokens - 1):
            token = scores.argmax(-1, keepdim=True)
            scores, new_keys, new_values = self.decode(token, torch.tensor([step]), position, keys, values, *cache)
            here = (self.decode.places == step)[:, None]
            keys, values = torch.where(here, new_keys, keys), torch.where(here, new_values, values)
            found.append(scores)
        return (torch.stack(found, dim=1),)
