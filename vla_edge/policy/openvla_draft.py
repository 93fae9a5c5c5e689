"""Drafts of an OpenVLA's tokens: small networks that propose the tokens after the newest one, all in one pass, out of what
the policy itself found where it told the newest (its `feature`, the normalized state that its head scores).

Whatever they propose, the policy verifies (`openvla_tokens.Decode`), so that a draft decides how many passes a chunk takes
and never what it is. Two kinds are known:

- `BlockDraft`: a bidirectional block of masked tokens beside the policy's feature, in the manner of DFlash (Chen et al., 2026,
  arXiv:2602.06036), whose draft reads features of all places where this one reads the newest. `vla-edge draft` trains it.
- `MedusaDraft`: a head for each token ahead (Cai et al., 2024, arXiv:2401.10774), under the names of the Medusa project.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.bins import BINS
from vla_edge.policy.blocks import DecoderLayer, Fold, RMSNorm, attend
from vla_edge.policy.chain import Chain, numbered
from vla_edge.policy.draft_shapes import BLOCK, HEAD_DIM, TOKENS, DraftConfig

EPS = 1e-6


def make_draft(config: DraftConfig) -> BlockDraft | MedusaDraft:
    """A draft of those shapes. It proposes `tokens` at a time, which `propose_` makes fewer, or more where it can."""
    return (BlockDraft if config.kind == BLOCK else MedusaDraft)(config)


class BlockDraft(Chain):
    """feature (B, feature), step (B,), known (B, T) -> scores (B, tokens, 256) of the tokens after place `step`.

    `known` holds the chunk's tokens up to place `step`; what stands behind is not looked at, but taken for masked.
    """

    INPUTS = ("feature", "step", "known")

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config, self.tokens = config, min(TOKENS, config.most_tokens)
        width = config.width
        self.words = nn.Embedding(BINS + 1, width)  # the last is the mask
        self.places = nn.Embedding(config.places, width)
        self.fuse = nn.Linear(config.feature, width)
        heads = width // HEAD_DIM
        self.layers = nn.ModuleList(
            DecoderLayer(width, config.hidden, heads, heads, HEAD_DIM, EPS) for _ in range(config.layers)
        )
        self.norm = RMSNorm(width, EPS)
        self.head = nn.Linear(width, BINS, bias=False)

    def propose_(self, tokens: int) -> None:
        """From now on so many tokens at a time, 1 to `config.most_tokens`."""
        self.tokens = tokens

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        return ("words", "places", "fuse"), *numbered("layers", self.layers), ("norm", "head")

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`."""
        feature, step, known = inputs
        if number == 0:
            places = torch.arange(self.config.places, device=known.device)[None]
            shown = torch.where(places < step[:, None] + 1, known, BINS)
            block = self.words(shown) + self.places(places)
            return (torch.cat([self.fuse(feature)[:, None], block], dim=1),), ()
        (x,) = handed
        if number <= len(self.layers):
            layer = self.layers[number - 1]
            normed = layer.attention_norm(x)
            return (layer.finish(x, attend(layer.queries(normed), *layer.project(normed, normed))[0]),), ()
        # behind the row of the feature; a matrix that chooses rows is what every runtime has, and gathering them is not
        wanted = step[:, None] + torch.arange(2, self.tokens + 2, device=x.device)
        chosen = wanted[..., None] == torch.arange(x.shape[1], device=x.device)
        return (self.head(self.norm(chosen.to(x.dtype) @ x)),), ()

    def folds(self) -> tuple[Fold, ...]:
        """See `Fold`."""
        return (Fold(self.norm, (self.head,)),)


class MedusaLayer(nn.Module):
    """x -> x + SiLU(W x + b)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaDraft(Chain):
    """feature (B, feature), step (B,) -> scores (B, tokens, 256): of head i, which sees the feature alone, those of the token
    i + 1 places after the newest. The step does not matter to it."""

    INPUTS = ("feature", "step")

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config, self.tokens = config, config.most_tokens
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(MedusaLayer(config.feature) for _ in range(config.layers)), nn.Linear(config.feature, BINS, bias=False)
            )
            for _ in range(config.most_tokens)
        )

    def propose_(self, tokens: int) -> None:
        """From now on so many tokens at a time; heads of later ones go, so that no stage holds them."""
        self.heads, self.tokens = self.heads[:tokens], tokens

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`: a head each."""
        return numbered("heads", self.heads)

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; handed on are the scores."""
        scores = (*handed, self.heads[number](inputs[0]))
        return ((torch.stack(scores, dim=1),) if number == len(self.heads) - 1 else scores), ()
