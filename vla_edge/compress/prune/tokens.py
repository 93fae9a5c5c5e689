"""Image tokens left out once the first text layers have seen them all, fewer of those that move the robot.

A token matters by how much it is looked at: the column of the attention (FastV, Chen et al., 2024, arXiv:2403.06764;
SparseVLM, Zhang et al., 2024, arXiv:2410.04417), computed in blocks of queries, never as a whole matrix. Heads differ
in what their looks are worth, and so do places of the picture. Both are learned from the recording, without training: by
least squares to how far the action chunk moves when later layers and the action expert see a little less of a token.
On the reference policy that halves what the mean over the heads costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vla_edge.compress.calibrate import CalibrationError
from vla_edge.compress.importance import chunk_along
from vla_edge.compress.recipe import RecipeError
from vla_edge.compress.steps import PruneTokens
from vla_edge.policy.narrow import TokenChoice
from vla_edge.types import Observation

SEED = 0
# of a head's mean square look, so that heads that look alike share the worth
_DAMPING = 1e-3


class Dimmer(TokenChoice):
    """Leaves all tokens in, remembers how much each was looked at, and lets a little less of them be seen by `dim`."""

    dims = True

    def __init__(self, after: int, tokens: int, heads: int):
        super().__init__(after, tokens, torch.zeros(heads), torch.zeros(tokens))
        self.looks = self.dim = torch.zeros(())

    def forward(self, looks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        self.looks, self.dim = looks.detach(), torch.zeros_like(mask, requires_grad=True)
        return torch.arange(self.count).expand(len(looks), -1), mask - self.dim


def prune_tokens_(
    step: PruneTokens,
    policy,
    checkpoint,
    observations: Sequence[Observation] = (),
    progress: Callable[[float], None] | None = None,
) -> None:
    """Have `policy` go on with fewer image tokens.

    Args:
        observations: that tell which, where the step looks at data; see `choose_tokens` for the rest.
    """
    reader = policy.reader
    count = step.kept(len(reader.image_places))
    if step.by == "attention":
        reader.choice = most_looked_at(policy, step.after, count)
    else:
        reader.choice = choose_tokens(policy, checkpoint, step.after, count, observations, progress)


def choose_tokens(
    policy,
    checkpoint,
    after: int,
    count: int,
    observations: Sequence[Observation],
    progress: Callable[[float], None] | None = None,
) -> TokenChoice:
    """How `policy` is to choose `count` image tokens after its first `after` text layers, by how far they move the chunk.

    Args:
        policy: in PyTorch; left as it is. checkpoint: that it was loaded from.

    Raises:
        CalibrationError: there are no observations, or the chunk's gradient is not finite.
        RecipeError: every text layer that looks at tokens was taken out.
    """
    from vla_edge.learn.frames import from_observations

    if not observations:
        raise CalibrationError("there are no observations to learn from which image tokens matter; give a recording")
    frames = from_observations(observations, checkpoint.spec, checkpoint.tokenizer_path)
    reader, generator = policy.reader, torch.Generator().manual_seed(SEED)
    looks, moves = [], []
    before, trained = reader.choice, [parameter for parameter in policy.parameters() if parameter.requires_grad]
    reader.choice = dimmer = Dimmer(after, len(reader.image_places), policy.config.heads)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        if reader.narrows_at is None:
            raise RecipeError("no text layer is left that looks at image tokens; take fewer layers out")
        for index in range(len(frames)):
            chunk_along(policy, checkpoint.spec, frames.take([index]), generator).backward()
            looks.append(dimmer.looks[0].T.numpy())
            moves.append(dimmer.dim.grad[0, reader.image_places].abs().numpy())
            if progress is not None:
                progress((index + 1) / len(frames))
    finally:
        reader.choice = before
        for parameter in trained:
            parameter.requires_grad_()
    heads, places = worth_of(np.stack(looks), np.stack(moves))
    return TokenChoice(after, count, torch.from_numpy(heads), torch.from_numpy(places))


def most_looked_at(policy, after: int, count: int) -> TokenChoice:
    """The choice by the mean over the heads alone, as in FastV: of no data, and of a policy that need not be in memory."""
    heads = policy.config.heads
    return TokenChoice(after, count, torch.full((heads,), 1 / heads), torch.zeros(len(policy.reader.image_places)))


def worth_of(looks: np.ndarray, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each head's looks and each place are worth: least squares of looks @ heads + places to `moves`.

    Args:
        looks: (n, tokens, H). moves: (n, tokens), how far the chunk moves with each token; observations count alike.

    Returns:
        (H,) and (tokens,), float32.

    Raises:
        CalibrationError: a number is not finite.
    """
    looks, moves = np.asarray(looks, np.float64), np.asarray(moves, np.float64)
    if not (np.isfinite(looks).all() and np.isfinite(moves).all()):
        raise CalibrationError("the action chunk's gradient at the image tokens is not finite; check the recording")
    moves = moves / np.maximum(moves.mean(1, keepdims=True), 1e-30)
    # what a place explains whoever looks is taken out first (Frisch & Waugh, 1933)
    varying = (looks - looks.mean(0)).reshape(-1, looks.shape[2])
    gram = varying.T @ varying
    gram[np.diag_indices_from(gram)] += max(_DAMPING * np.trace(gram) / len(gram), 1e-30)
    heads = np.linalg.solve(gram, varying.T @ (moves - moves.mean(0)).ravel())
    places = (moves - looks @ heads).mean(0)
    return heads.astype(np.float32), places.astype(np.float32)
