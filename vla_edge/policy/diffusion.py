"""Diffusion Policy (Chi et al., 2023, arXiv:2303.04137), the one whose denoiser is a U-Net over time.

What the cameras show becomes a few points per picture (spatial softmax), which with the states of the last observations
scale and shift every block of the U-Net (FiLM, Perez et al., 2018, arXiv:1709.07871), beside the noise level. That
modulation is a linear layer over both: the observations' share of it is computed once per observation, `prefix`, and the
noise level's once per engine, `time`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.convolution import Convolution, GroupNorm, Upsampling
from vla_edge.policy.resnet import ResNet, feature_size
from vla_edge.policy.schedule import denoising_steps
from vla_edge.policy.spec import DiffusionSpec
from vla_edge.policy.stages import Stage, TensorSpec

GRADIENT_STEPS = 10
LAST_GROUPS = 8  # of the normalization before the actions, whatever the others have


@dataclass(frozen=True)
class DiffusionConfig:
    """Shapes of a diffusion policy.

    Attributes:
        height, width: of a picture, px.
        blocks, channels: of the ResNet's stages, and of its first. grouped: its normalization, see `policy.resnet`.
        keypoints: of a picture. observations: that are read.
        widths: channels of the U-Net at each resolution. kernel: taps in time. groups: of its normalization.
        level_width: of the embedding of a noise level. scales: whether FiLM scales too, and not only shifts.
        chunk_size: T, of the rows that `diffusion` denoises.
    """

    cameras: int
    height: int
    width: int
    blocks: tuple[int, ...]
    channels: int
    grouped: bool
    keypoints: int
    observations: int
    state_dim: int
    action_dim: int
    widths: tuple[int, ...]
    kernel: int
    groups: int
    level_width: int
    scales: bool
    chunk_size: int
    diffusion: DiffusionSpec

    @property
    def features(self) -> int:
        """Numbers of a picture."""
        return 2 * self.keypoints

    @property
    def block_widths(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each block, in order: two at each resolution down, two at the bottom, two each up."""
        found, inputs = [], self.action_dim
        for width in self.widths:
            found += [(inputs, width), (width, width)]
            inputs = width
        found += [(inputs, inputs)] * 2
        for above, width in zip(self.widths[-2::-1], self.widths[:0:-1]):
            found += [(2 * width, above), (above, above)]
        return tuple(found)

    @property
    def films(self) -> tuple[int, ...]:
        """Numbers that modulate each block."""
        return tuple((1 + self.scales) * outputs for _, outputs in self.block_widths)


def mish(x: Tensor) -> Tensor:
    """Misra, 2019, arXiv:1908.08681."""
    return x * F.softplus(x).tanh()


class VisionTower(nn.Module):
    """image (B, 3, H, W) -> image_tokens (B, 1, features): where in the picture each keypoint is, through a layer."""

    def __init__(self, c: DiffusionConfig):
        super().__init__()
        self.backbone = ResNet(c.blocks, c.channels, c.grouped)
        self.keypoints = nn.Linear(self.backbone.width, c.keypoints)
        self.out = nn.Linear(c.features, c.features)
        rows, columns = feature_size(c.height, c.width)
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        # of one row or column numpy's linspace gives its beginning, and so does torch's
        self.register_buffer("places", torch.stack([x.flatten(), y.flatten()], -1)[None, :, None], persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        seen = self.keypoints(self.backbone(image).flatten(1, 2)).softmax(1)
        points = (seen[..., None] * self.places).sum(1)
        return (self.out(points.flatten(1)).relu()[:, None],)


class Films(nn.Module):
    """(B, inputs) -> what it adds to the modulation of all blocks, one after the other (B, sum of films)."""

    def __init__(self, c: DiffusionConfig, inputs: int, bias: bool):
        super().__init__()
        self.films = nn.ModuleList(nn.Linear(inputs, outputs, bias) for outputs in c.films)

    def modulation(self, x: Tensor) -> Tensor:
        x = mish(x)
        return torch.cat([film(x) for film in self.films], dim=-1)


class Prefix(Films):
    """image_tokens (B, S * cameras, features) and state (B, S, D) of S observations -> film."""

    def __init__(self, c: DiffusionConfig):
        super().__init__(c, c.observations * (c.state_dim + c.cameras * c.features), bias=False)

    def forward(self, image_tokens: Tensor, state: Tensor) -> tuple[Tensor]:
        seen = image_tokens.reshape(*state.shape[:2], -1)
        return (self.modulation(torch.cat([state, seen], dim=-1).flatten(1)),)


class LevelEncoder(Films):
    """Noise level (B,) -> time_condition."""

    def __init__(self, c: DiffusionConfig):
        super().__init__(c, c.level_width, bias=True)
        self.mlp_in, self.mlp_out = nn.Linear(c.level_width, 4 * c.level_width), nn.Linear(4 * c.level_width, c.level_width)
        half = c.level_width // 2
        frequency = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, time: Tensor) -> tuple[Tensor]:
        turns = time[:, None] * self.frequency
        embedding = torch.cat([turns.sin(), turns.cos()], dim=-1)
        return (self.modulation(self.mlp_out(mish(self.mlp_in(embedding)))),)


class Part(nn.Module):
    """A convolution over time, group normalization and Mish."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int):
        super().__init__()
        self.convolution = Convolution(inputs, outputs, (kernel,), padding=kernel // 2)
        self.norm = GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return mish(self.norm(self.convolution(x)))


class FilmBlock(nn.Module):
    """Two parts, modulated in between, beside what came in."""

    def __init__(self, inputs: int, outputs: int, c: DiffusionConfig):
        super().__init__()
        self.scales = c.scales
        self.first, self.second = (Part(width, outputs, c.kernel, c.groups) for width in (inputs, outputs))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x (B, T, inputs), film (B, 1, outputs or twice that)."""
        out = self.first(x)
        if self.scales:
            scale, film = film.chunk(2, dim=-1)
            out = scale * out
        return self.second(out + film) + self.shortcut(x)


class Denoiser(nn.Module):
    """Noisy actions x (B, horizon, A) -> prediction of the noise in them, or of the actions."""

    def __init__(self, c: DiffusionConfig):
        super().__init__()
        self.films = c.films
        self.blocks = nn.ModuleList(FilmBlock(*widths, c) for widths in c.block_widths)
        self.downs = nn.ModuleList(Convolution(width, width, (3,), stride=2, padding=1) for width in c.widths[:-1])
        self.ups = nn.ModuleList(Upsampling(width) for width in c.widths[-2::-1])
        self.last = Part(c.widths[0], c.widths[0], c.kernel, LAST_GROUPS)
        self.action_out = nn.Linear(c.widths[0], c.action_dim)

    def forward(self, x: Tensor, time_condition: Tensor, film: Tensor) -> tuple[Tensor]:
        films = (film + time_condition)[:, None].split(self.films, dim=-1)
        blocks, passed = iter(zip(self.blocks, films)), []

        def twice(h: Tensor) -> Tensor:
            for _ in range(2):
                block, modulation = next(blocks)
                h = block(h, modulation)
            return h

        for down in self.downs:
            passed.append(twice(x))
            x = down(passed[-1])
        passed.append(twice(x))
        x = twice(passed[-1])
        for up in self.ups:
            x = up(twice(torch.cat([x, passed.pop()], dim=-1)))
        return (self.action_out(self.last(x)),)


class DiffusionPolicy(nn.Module):
    """The whole policy, made of its stages."""

    matched = None

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.prefix = Prefix(config)
        self.time = LevelEncoder(config)
        self.denoise = Denoiser(config)

    def chunk(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor) -> Tensor:
        """Normalized actions (1, T, A), differentiable, from noise that is always the same and in few steps; there are no
        words."""
        c = self.config
        shape = (1, c.diffusion.horizon, c.action_dim)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        (film,) = self.prefix(image_tokens, state.reshape(len(state), c.observations, c.state_dim))
        for step in denoising_steps(c.diffusion, min(GRADIENT_STEPS, c.diffusion.train_steps)):
            (prediction,) = self.denoise(x, self.time(torch.tensor([float(step.level)]))[0], film)
            x = step(x, prediction, torch.zeros(shape))
        return x[:, c.diffusion.first : c.diffusion.first + c.chunk_size]

    def stages(self) -> tuple[Stage, ...]:
        """vision, prefix, time, denoise; batch 1, static shapes (see `policy.stages`)."""
        c = self.config
        image = TensorSpec("image", (1, 3, c.height, c.width))
        token = TensorSpec("image_tokens", (1, 1, c.features))
        tokens = TensorSpec("image_tokens", (1, c.observations * c.cameras, c.features))
        state = TensorSpec("state", (1, c.observations, c.state_dim))
        film, condition = (TensorSpec(name, (1, sum(c.films))) for name in ("film", "time_condition"))
        rows = (1, c.diffusion.horizon, c.action_dim)
        return (
            Stage("vision", self.vision, (image,), (token,)),
            Stage("prefix", self.prefix, (tokens, state), (film,)),
            Stage("time", self.time, (TensorSpec("time", (1,)),), (condition,)),
            Stage("denoise", self.denoise, (TensorSpec("x", rows), condition, film), (TensorSpec("prediction", rows),)),
        )
