"""Training losses of a flow policy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vla_edge.policy.smolvla import PrefixCache, SmolVLA


def flow_matching_loss(
    policy: SmolVLA, cache: PrefixCache, actions: Tensor, draws: int, generator=None, prefix: int = 0
) -> Tensor:
    """Mean squared error of the flow velocity (Lipman et al., 2022), in LeRobot's convention: t = 1 is noise, t drawn
    from Beta(1.5, 1), target velocity noise - action.

    The prefix is by far the dearer half of a step, so every observation is used with several draws of (noise, t).

    Args:
        cache: of B observations. actions: (B, T, A) normalized and zero padded. draws: (noise, t) pairs each.
        prefix: of every chunk, up to so many first rows are given without noise and not learnt (training-time
            real-time chunking, Black et al., 2025, arXiv:2512.05964); how many, from 0 on, is drawn for each.
    """
    mixed, time, wanted = flow_points(actions, draws, generator)
    condition, error = policy.time(time)[0], 1.0
    if prefix:
        rows = torch.randint(prefix + 1, (len(mixed), 1), generator=generator)
        given = torch.arange(mixed.shape[1]) < rows
        mixed = torch.where(given[..., None], actions.repeat(draws, 1, 1), mixed)
        clean = policy.time(torch.zeros_like(time))[0]
        condition = torch.where(given[..., None], clean[:, None], condition[:, None])
        error = (~given)[..., None] * (given.numel() / (~given).sum())
    velocity = policy.denoise(mixed, condition, *repeat_cache(cache, draws))[0]
    return ((velocity - wanted).square() * error).mean()


def flow_points(actions: Tensor, draws: int, generator=None) -> tuple[Tensor, Tensor, Tensor]:
    """Points on the straight ways from actions to noise: (x, time, velocity of that way), `draws` for each chunk."""
    actions = actions.repeat(draws, 1, 1)
    noise = torch.randn(actions.shape, generator=generator)
    # a Beta(1.5, 1) variate is U^(1 / 1.5)
    time = torch.rand(len(actions), generator=generator).pow(1 / 1.5) * 0.999 + 0.001
    return time[:, None, None] * noise + (1 - time[:, None, None]) * actions, time, noise - actions


def velocity(policy, points: tuple[Tensor, ...], cache: PrefixCache) -> Tensor:
    """Of the flow at (x, time), for a cache of as many observations or a divisor of it."""
    x, time = points[:2]
    return policy.denoise(x, policy.time(time)[0], *repeat_cache(cache, len(x) // cache.mask.shape[0]))[0]


def euler_path(policy: SmolVLA, x: Tensor, cache: PrefixCache, num_steps: int) -> Iterator[Tensor]:
    """From noise (B, T, A): x after each of `num_steps` steps of the flow."""
    for step in range(num_steps):
        time = torch.full((len(x),), 1 - step / num_steps)
        x = x - policy.denoise(x, policy.time(time)[0], *cache)[0] / num_steps
        yield x


def repeat_cache(cache: PrefixCache, times: int) -> PrefixCache:
    """The cache of a batch that is shown `times` times over."""
    return type(cache)(
        cache.keys.repeat(1, times, 1, 1, 1),
        cache.values.repeat(1, times, 1, 1, 1),
        *(tensor.repeat(times, *[1] * (tensor.ndim - 1)) for tensor in cache[2:]),
    )


def pointer_loss(attention: list[Tensor], pointer: Tensor, lang_mask: Tensor, layers: tuple[int, ...], grid: int):
    """Cross-entropy of the text-to-image attention against where the named object is.

    Grounding, not motion, is what a small policy fails to find from actions alone; the label comes from the
    demonstration itself. One head in each of `layers` is supervised, on every word, and is free to be used by the
    policy; the architecture is untouched.

    Args:
        attention: per text layer (B, H, P, P), image tokens first, then L words, then the state.
        pointer: (B, 2) x, y of the object in [0, 1] of the image; frames where it lies outside do not count.
        lang_mask: (B, L).
        layers: indices into `attention`. grid: image tokens along a side.
    """
    tokens, length = grid * grid, lang_mask.shape[1]
    target = splat(pointer, grid)
    seen = ((pointer >= 0) & (pointer <= 1)).all(1)
    weight = lang_mask * seen[:, None]
    weight = weight / weight.sum().clamp(min=1)
    loss = torch.zeros(())
    for layer in layers:
        probabilities = attention[layer][:, 0, -length - 1 : -1, :tokens] + 1e-6
        share = probabilities.sum(-1, keepdim=True)
        where = -(target[:, None] * (probabilities / share).log()).sum(-1)
        # the share of attention that leaves the words for the image counts too, or pointing could stay faint
        loss = loss + ((where - 0.1 * share[..., 0].log()) * weight).sum()
    return loss / len(layers)


def splat(point: Tensor, grid: int) -> Tensor:
    """(B, 2) x, y in [0, 1] -> (B, grid * grid) bilinear weights of the cells around it, row by row, summing to 1."""
    centre = (point * grid - 0.5).clamp(0, grid - 1)
    near = 1 - (centre[:, :, None] - torch.arange(grid, dtype=centre.dtype)).abs()
    x, y = near.clamp(min=0).unbind(1)
    return (y[:, :, None] * x[:, None, :]).flatten(1)
