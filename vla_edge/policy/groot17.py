"""GR00T N1.7 (NVIDIA, 2026): as N1.5 (`policy.groot`), with a Qwen3-VL (2025, arXiv:2511.21631) to see and to read.

Its vision transformer turns queries and keys by where a patch is, and gives besides its words what some of its layers saw
(DeepStack, 2024, arXiv:2406.04334), which is added behind the first text layers. Those are turned by time, row and column
of a token (interleaved M-RoPE). Of the layers of the diffusion transformer that look at the observation some look at the
pictures and the others at what is told. test/parity holds the result to LeRobot's port.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.blocks import EncoderLayer, Fold, attend, padding_bias, rotary, rotate, split_heads
from vla_edge.policy.chain import Chain
from vla_edge.policy.groot import ActionHead, Groot, GrootConfig, PrefixEncoder, TimeEncoder

SEEN = 2  # in the mask of a cache, 1 being told and 0 not there
MERGED = 2  # side of the square of patches that becomes one token
WAVELENGTH = 10_000.0  # of the vision transformer's rotary embedding


@dataclass(frozen=True)
class Groot17Config(GrootConfig):
    """Shapes of a GR00T N1.7; `image_size` is the height, `connector` that of each of the 1 + D mergers.

    Attributes:
        image_columns: px.
        deep: D layers of the vision transformer whose output is added behind the text layers 0 to D - 1.
        sections: of a head's hd / 2 rotary frequencies, so many turn with time, row and column.
        text_every: of the layers that look at the observation the first of so many looks at what is told, the others at the
            pictures; every one looks at both when 0.
    """

    image_columns: int
    deep: tuple[int, ...]
    sections: tuple[int, int, int]
    text_every: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of one picture's tokens."""
        return tuple(size // self.patch_size // MERGED for size in self.image_shape)

    @property
    def image_tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def image_width(self) -> int:
        """A word, and what is added to it behind each of the first text layers."""
        return (1 + len(self.deep)) * self.text_width

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.image_size, self.image_columns


class TurnedLayer(EncoderLayer):
    """A layer of a vision transformer that turns queries and keys."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, width); cos, sin (1, T, hd / 2)."""
        normed = self.attention_norm(x)
        q, k, v = (split_heads(project(normed), self.head_dim) for project in (self.q, self.k, self.v))
        x = x + self.out(attend(rotate(q, cos, sin), rotate(k, cos, sin), v)[0])
        return x + self.mlp(self.mlp_norm(x))


class Merger(nn.Module):
    """Patches (B, 4 N, width) -> words (B, N, text_width) of four each.

    Args:
        size: (inputs, outputs) of both linear layers. joined: the norm is of four patches together.
    """

    def __init__(self, size: tuple[tuple[int, int], ...], joined: bool, eps: float):
        super().__init__()
        (inputs, hidden), (_, outputs) = size
        self.norm = nn.LayerNorm(inputs if joined else inputs // MERGED**2, eps=eps)
        self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, width = x.shape
        shape = batch, patches // MERGED**2, width * MERGED**2
        x = self.norm(x.reshape(shape)) if self.joined else self.norm(x).reshape(shape)
        return self.down(F.gelu(self.up(x)))

    def folds(self) -> tuple[Fold, ...]:
        """See `Fold`; channels of a norm of single patches go into four inputs each."""
        return (Fold(self.norm, (self.up,)),) if self.joined else ()


class QwenEncoder(nn.Module):
    """The vision transformer. Patches go through it square by square of those that become one token.

    A picture is one moment of a film to the original, shown twice; its embedding of two moments is one of their sum here.
    """

    def __init__(self, c: Groot17Config):
        super().__init__()
        self.patch_size, self.grid = c.patch_size, c.grid
        rows, columns = (MERGED * side for side in c.grid)
        self.patch_embedding = nn.Linear(3 * c.patch_size**2, c.vision_width)
        self.position_embedding = nn.Parameter(torch.zeros(rows * columns, c.vision_width))
        self.layers = nn.ModuleList(
            TurnedLayer(c.vision_width, c.vision_hidden, c.vision_heads, c.vision_eps) for _ in range(c.vision_layers)
        )
        # half of a head turns with the row, half with the column
        places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        turns = rotary(self.squares(places)[None], c.vision_width // c.vision_heads // 2, WAVELENGTH)
        for name, table in zip(("cos", "sin"), turns):
            self.register_buffer(name, table.flatten(2), persistent=False)

    def squares(self, patches: Tensor) -> Tensor:
        """(rows, columns, ...) -> (rows * columns, ...), square by square."""
        (rows, columns), rest = self.grid, patches.shape[2:]
        parts = patches.reshape(rows, MERGED, columns, MERGED, *rest).transpose(1, 2)
        return parts.reshape(rows * columns * MERGED**2, *rest)

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> what the layers read, (B, 4 N, width)."""
        batch, (rows, columns), patch = image.shape[0], self.grid, self.patch_size
        patches = image.view(batch, 3, rows, MERGED, patch, columns, MERGED, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
        flat = patches.reshape(batch, rows * columns * MERGED**2, 3 * patch**2)
        return self.patch_embedding(flat) + self.position_embedding


class QwenVision(Chain):
    """image (B, 3, H, W) in [-1, 1] -> image_tokens (B, N, image_width)."""

    def __init__(self, c: Groot17Config):
        super().__init__()
        self.deep, self.encoder = c.deep, QwenEncoder(c)
        self.merger = Merger(c.connector, False, c.vision_eps)
        self.deep_mergers = nn.ModuleList(Merger(c.connector, True, c.vision_eps) for _ in c.deep)

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        layers = tuple(
            (f"encoder.layers.{number}", *((f"deep_mergers.{self.deep.index(number)}",) if number in self.deep else ()))
            for number in range(len(self.encoder.layers))
        )
        return ("encoder.patch_embedding", "encoder.position_embedding"), *layers, ("merger",)

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; handed on are the patches (B, 4 N, width), and what of the layers so far is added behind text layers."""
        if number == 0:
            return (self.encoder.embed(*inputs),), ()
        x, *seen = handed
        if number > len(self.encoder.layers):
            return (torch.cat([self.merger(x), *seen], dim=-1),), ()
        x = self.encoder.layers[number - 1](x, self.encoder.cos, self.encoder.sin)
        if number - 1 in self.deep:
            seen.append(self.deep_mergers[self.deep.index(number - 1)](x))
        return (x, *seen), ()


class Prefix17(PrefixEncoder):
    """With a language model whose own last norm is not used. The mask that goes with the cache is 1 where a token is told and
    2 where it is seen, so that tokens can cross in any order."""

    def __init__(self, c: Groot17Config):
        super().__init__(c)
        self.norm = nn.Identity()

    @property
    def layers_shown(self) -> int:
        """See `Narrowing`."""
        return max(1, len(self.config.deep))

    def kinds_of(self, c: Groot17Config) -> Tensor:
        """See `PrefixEncoder`."""
        kinds = torch.ones(1, c.prefix_length)
        for begin in c.picture_places if c.text_every else ():
            kinds[:, begin : begin + c.image_tokens] = SEEN
        return kinds

    def turns(self, c: Groot17Config) -> tuple[Tensor, Tensor]:
        """See `PrefixEncoder`. Of time, row and column each frequency knows one: they take turns as long as there are some
        of each, and the rest know time."""
        places = torch.tensor(token_places(c))[None]
        tables = rotary(places.movedim(-1, 0), c.head_dim, c.wavelength)
        knows = torch.zeros(c.head_dim // 2, dtype=torch.long)
        for axis in (1, 2):
            knows[axis : 3 * c.sections[axis] : 3] = axis
        every = torch.arange(c.head_dim // 2)
        return tuple(table.permute(1, 2, 3, 0)[..., every, knows] for table in tables)

    def words(self, image_tokens: Tensor) -> Tensor:
        return image_tokens[..., : self.config.text_width]

    def read(self, number: int, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, image_tokens: Tensor) -> tuple[Tensor, ...]:
        """See `PrefixEncoder`; behind the first layers pictures are shown again."""
        x, *looks = super().read(number, x, cos, sin, bias, image_tokens)
        if number < len(self.config.deep):
            width = self.config.text_width
            seen = image_tokens[..., (1 + number) * width : (2 + number) * width]
            x = x + self.with_pictures(x.new_zeros(x.shape[0], self.config.language_length, width), seen)
        return x, *looks


def token_places(c: Groot17Config) -> list[tuple[int, int, int]]:
    """(time, row, column) of each token of the prefix: those of a picture share a time, and what follows goes on behind the
    greatest of its three."""
    places: list[tuple[int, int, int]] = []
    now, pictures, (rows, columns) = 0, set(c.picture_places), c.grid
    while len(places) < c.prefix_length:
        if len(places) in pictures:
            places += [(now, now + row, now + column) for row in range(rows) for column in range(columns)]
            now += max(rows, columns)
        else:
            places.append((now, now, now))
            now += 1
    return places


class Head17(ActionHead):
    """Whose layers look at the pictures or at what is told, not at both."""

    def __init__(self, c: Groot17Config):
        super().__init__(c)
        self.text_every = c.text_every

    def looked_at(self, layer: int, mask: Tensor) -> Tensor:
        """See `ActionHead`; the mask is `Prefix17`'s."""
        if not self.text_every:
            return super().looked_at(layer, mask)
        told = layer % (2 * self.text_every) == 0
        # 0, 1 and 2 are 0, 1 and 0 to those that look at what is told, and 0, 0 and 1 to the others
        return padding_bias(mask * (SEEN - mask) if told else mask * (mask - 1) / SEEN)


class Groot17(Groot):
    """The whole policy, made of its stages."""

    PARTS: ClassVar = (QwenVision, Prefix17, TimeEncoder, Head17)
