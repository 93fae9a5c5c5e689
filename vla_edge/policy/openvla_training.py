"""What an OpenVLA says about a batch of observations in one pass that can be differentiated: the scores of all tokens of
a chunk, each after the tokens it is told (teacher forcing, Williams & Zipser, 1989), or OFT's actions.

The stages are of one observation and of a robot's way through them; what is computed here is the same. The activations
of a text layer are computed again when its gradient is due (Chen et al., 2016, arXiv:1604.06174): of all layers together
they would be many times the policy itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vla_edge.policy.blocks import causal_bias, padding_bias, rotary
from vla_edge.policy.narrow import taken
from vla_edge.policy.openvla import OpenVLA
from vla_edge.policy.openvla_tokens import through


class Said(NamedTuple):
    """Of B observations.

    Attributes:
        output: (B, T, A, 256) scores, or (B, T, A) normalized actions.
        features: where asked for, keys and values of the prompt, (layers, B, KVH, P, hd) each, 0 where it is padding.
        looks: where asked for, how much the T * A places that tell a value look at every place, of each layer
            (B, H, T * A, P + more).
        states: where asked for, what tells each value, as the head sees it: (B, T * A, width).
    """

    output: Tensor
    features: tuple[Tensor, ...] = ()
    looks: tuple[Tensor, ...] = ()
    states: Tensor | None = None


def say(
    policy: OpenVLA, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor,
    tokens: Tensor | None = None, features: bool = False, looks: bool = False, states: bool = False,
) -> Said:  # fmt: skip
    """What the policy says.

    Args:
        image_tokens: (B, cameras * N, width). lang_tokens, lang_mask: (B, L). state: (B, S).
        tokens: (B, T, A) int64, of the 256, that it is told; a policy whose actions are no tokens is told none.
        features, looks, states: whether to keep them; states are of policies that are told tokens.
    """
    c = policy.config
    reader = policy.reader
    if c.head_hidden:
        x, mask, last = reader.places(image_tokens, lang_tokens, lang_mask, state[:, : c.proprio_dim])
    else:
        x, mask, last = _told(policy, image_tokens, lang_tokens, lang_mask, tokens.flatten(1))
    bias = _bias(policy, mask)
    cos, sin = rotary(mask.cumsum(1) - 1, reader.head_dim, c.wavelength)
    # the last word tells the first value, and the places of the others tell the next
    after = torch.arange(c.prompt_length, c.prompt_length + c.tokens - 1, device=x.device)
    telling = torch.cat([last[:, None], after.expand(len(x), -1)], dim=1)
    if reader.narrows_at is not None:
        kept = _kept(policy, x, mask, cos, sin)
        bias = bias if c.head_hidden else bias + _hidden(kept, mask, reader.tokens)
    prompt, layers = c.prompt_length, []
    for number, layer in enumerate(reader.layers):
        asked = telling if looks else None, mask[:, :prompt] if features else None
        x, *of_layer = checkpoint(_layer, layer, x, cos, sin, bias, *asked, use_reentrant=False)
        layers.append(of_layer)
        if number == reader.narrows_at:
            x, mask, cos, sin = (taken(tensor, kept, 1) for tensor in (x, mask, cos, sin))
            bias, telling, prompt = _bias(policy, mask), telling - reader.left_out, prompt - reader.left_out
            if features:
                layers = [[*(taken(part, kept[:, :prompt], 2) for part in parts[:2]), parts[2]] for parts in layers]
    found = x.gather(1, telling[..., None].expand(-1, -1, c.width))
    normed = None if c.head_hidden else reader.norm(found)
    output = reader.actions(found) if c.head_hidden else reader.head(normed)
    keys, values, seen = zip(*layers)
    return Said(
        output.unflatten(1, (c.chunk_size, c.action_dim)) if tokens is not None else output,
        (torch.stack(keys), torch.stack(values)) if features else (),
        seen if looks else (),
        normed if states else None,
    )


def _told(policy: OpenVLA, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, tokens: Tensor):
    """As `Act.places`, of prompts followed by all tokens (B, T * A) but the last, which tells nothing."""
    words = policy.decode.words(tokens[:, :-1])
    x = torch.cat([policy.prefill.prompt(image_tokens, lang_tokens), words], dim=1)
    real, mask = x.new_ones(x.shape[:2]), lang_mask.to(x.dtype)
    pictures = image_tokens.shape[1]
    rest = real[:, : words.shape[1]]
    mask = torch.cat([mask[:, :1], real[:, :pictures], mask[:, 1:], rest], dim=1)
    return x, mask, pictures + lang_mask.to(torch.int64).sum(1) - 1


def _bias(policy: OpenVLA, mask: Tensor) -> Tensor:
    """What is added to scores where tokens of a mask (B, P) look at each other."""
    padding = padding_bias(mask)
    return padding if policy.config.head_hidden else padding + causal_bias(mask.shape[1]).to(padding)


@torch.no_grad()
def _kept(policy: OpenVLA, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Places (B, n) of the tokens that stay: those that the stage chooses among the tokens it reads, and all behind them."""
    reader, behind = policy.reader, torch.arange(policy.reader.tokens, mask.shape[1], device=x.device)
    x, mask, cos, sin = (tensor[:, : reader.tokens] for tensor in (x, mask, cos, sin))
    bias = _bias(policy, mask)
    for layer in reader.layers[: reader.narrows_at + 1]:
        x, q, k, *_ = through(layer, x, cos, sin, bias)
    return torch.cat([reader.choose(q, k, bias, mask)[0], behind.expand(len(x), -1)], dim=1)


def _hidden(kept: Tensor, mask: Tensor, own: int) -> Tensor:
    """What is added to scores (B, 1, T, T), since tokens from place `own` on read a cache that has the `kept` ones alone."""
    stays = torch.zeros_like(mask).scatter(1, kept, 1.0)
    behind = (torch.arange(mask.shape[1], device=mask.device) >= own).to(mask.dtype)
    return padding_bias(stays) * behind[:, None]


def _layer(layer, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, rows: Tensor | None, real: Tensor | None):
    """x after the layer; where `real` (B, P) is given its keys and values there; where `rows` (B, N) are, their looks."""
    x, _, k, v, looks = through(layer, x, cos, sin, bias)
    if real is not None:
        k, v = (part[:, :, : real.shape[1]] * real[:, None, :, None] for part in (k, v))
    if rows is not None:
        looks = looks.gather(2, rows[:, None, :, None].expand(-1, looks.shape[1], -1, looks.shape[3]))
    return x, *((k, v) if real is not None else (None, None)), looks if rows is not None else None
