"""Image tokens left out behind the first layers that read them (FastV, Chen et al., 2024, arXiv:2403.06764), for every stage
that reads pictures among words: from there on everything is shorter, the cache of the layers before included.

Shapes stay static: how many stay is fixed, and which is decided anew for each observation by how much each is looked at.
Those that stay keep their order and what their position made of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vla_edge.policy.blocks import Skipped, attention_columns, padding_bias
from vla_edge.policy.chain import Chain


class TokenChoice(nn.Module):
    """Which image tokens the text layers go on with, by how much each is looked at.

    Args:
        after: text layers that see all of them. count: how many stay.
        heads: (H,) what a look of each head of the last of these layers is worth.
        places: (image tokens,) what each place is worth whoever looks.
    """

    dims: ClassVar[bool] = False  # whether the mask that it gives has to be looked through although nothing in it is padding

    def __init__(self, after: int, count: int, heads: Tensor, places: Tensor):
        super().__init__()
        self.after, self.count = after, count
        self.register_buffer("heads", heads, persistent=False)
        self.register_buffer("places", places, persistent=False)

    def forward(self, looks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, image tokens) mean probabilities, and the mask (B, P) -> (B, count) image tokens that stay, and the mask
        from here on."""
        worth = (looks * self.heads[:, None]).sum(1) + self.places
        return worth.topk(self.count).indices, mask


class Narrowing(Chain):
    """A stage whose `layers` read image tokens among others, and go on with those that `choice` keeps.

    Of a stage from which nothing is left out pieces are the whole of it. With a choice the piece of layer `narrows_at` hands
    on, before all else, the places of the tokens that stay; `forward` takes them off, and takes the rows of the pieces before
    at these places.
    """

    layers_shown = 1  # so many are given pictures, so that all tokens have to be there

    def __init__(self) -> None:
        super().__init__()
        self.choice: TokenChoice | None = None  # all image tokens stay

    def sees(self, places: Iterable[int], tokens: int) -> None:
        """Says where among so many `tokens` that the layers read those of pictures are."""
        image = list(places)
        others = sorted(set(range(tokens)).difference(image))
        self.register_buffer("image_places", torch.tensor(image), persistent=False)
        self.register_buffer("other_places", torch.tensor(others), persistent=False)

    @property
    def narrows_at(self) -> int | None:
        """The layer whose looks decide which image tokens stay: of those that are left the first that is late enough, or the
        last."""
        left = [i for i, layer in enumerate(self.layers) if not isinstance(layer, Skipped)]
        if self.choice is None or not left:
            return None
        after = max(self.choice.after, self.layers_shown)
        return next((i for i in left if i + 1 >= after), left[-1])

    @property
    def left_out(self) -> int:
        """Image tokens that do not stay."""
        return 0 if self.narrows_at is None else len(self.image_places) - self.choice.count

    @property
    def tokens(self) -> int:
        """P that the first layers read."""
        return len(self.image_places) + len(self.other_places)

    @property
    def length(self) -> int:
        """P that the last layers read."""
        return self.tokens - self.left_out

    def choose(self, q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens stay behind a layer.

        Args:
            q, k, bias: that the layer attends by, see `attention_columns`. mask: (B, P) 1 where a token is real.

        Returns:
            Their places (B, n), in order, and their mask (B, n).
        """
        columns = attention_columns(q, k, bias, mask) / mask.sum(1)[:, None, None]
        chosen, mask = self.choice(columns[:, :, self.image_places], mask)
        others = self.other_places.expand(len(chosen), -1)
        kept = torch.cat([self.image_places[chosen], others], 1).sort().values
        return kept, taken(mask, kept, 1)

    def in_order(self, causal: Tensor, mask: Tensor) -> Tensor:
        """What is added to the scores of a layer whose tokens see those before them: of `causal` (1, 1, P, P) as much as there
        are tokens in `mask`, since these keep their order. Padding comes last, so no real token looks at it."""
        left = mask.shape[1]
        bias = causal if left == causal.shape[-1] else causal[:, :, :left, :left]
        return bias + padding_bias(mask) if self.choice is not None and self.choice.dims else bias

    def narrowed(self, number: int, handed: Sequence[Tensor], given: list[Sequence[Tensor]]):
        """What piece `number` hands on, and the rows so far, at the places of the tokens that stay."""
        if number - 1 != self.narrows_at:
            return handed, given
        kept, *handed = handed
        return handed, [tuple(taken(row, kept, 2) for row in rows) for rows in given]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        handed: tuple[Tensor, ...] = ()
        given: list[Sequence[Tensor]] = []
        for number in range(len(self.pieces())):
            handed, rows = self.piece(number, handed, inputs)
            handed, given = self.narrowed(number, handed, [*given, rows])
        return (*handed, *(torch.stack(parts) for parts in zip(*filter(None, given))))


def taken(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Of each observation its own `index` (B, n) along `dim`; a scalar stays as it is."""
    if not tensor.ndim:
        return tensor
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = index.shape
    if len(tensor) != len(index):
        tensor = tensor.expand(len(index), *tensor.shape[1:])
    return tensor.gather(dim, index.view(shape).expand(*tensor.shape[:dim], -1, *tensor.shape[dim + 1 :]))
