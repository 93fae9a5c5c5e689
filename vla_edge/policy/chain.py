"""A stage whose forward is one piece after the other, so that a policy larger than memory runs a piece at a time.

A piece reads what the one before hands on and the stage's own inputs, and needs the parameters of its own modules only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Chain(nn.Module):
    """`forward` of a stage out of its pieces.

    The first piece makes what is handed on out of the inputs, each of the others out of that, and the last makes the stage's
    outputs of it, but for those that hold a row for each of some pieces (`has_rows`), which give it.
    """

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """Of each piece the modules and parameters that it needs, as paths in this module; together they are all of it."""
        raise NotImplementedError

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Piece `number` -> what it hands on, and its rows.

        Args:
            handed: by the piece before; nothing to the first.
            inputs: of the stage. Of one with a row for each piece, only the piece's own is looked at: of piece n row n - 1.
        """
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        handed: tuple[Tensor, ...] = ()
        given = []
        for number in range(len(self.pieces())):
            handed, rows = self.piece(number, handed, inputs)
            given.append(rows)
        return (*handed, *(torch.stack(parts) for parts in zip(*filter(None, given))))


class Whole(Chain):
    """A module that is one piece."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`; paths are those in the module."""
        own = (name for name, _ in self.module.named_parameters(recurse=False))
        return ((*(name for name, _ in self.module.named_children()), *own),)

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`."""
        return self.module(*inputs), ()


def chain_of(module: nn.Module) -> Chain:
    """A stage's module in pieces; one that is no chain is a single piece."""
    return module if isinstance(module, Chain) else Whole(module)


def has_rows(name: str) -> bool:
    """Whether a tensor between stages holds a row for each of some pieces: keys and values do, one for each layer."""
    return name.endswith(("_keys", "_values"))


def belongs(name: str, piece: Iterable[str]) -> bool:
    """Whether the module or parameter `name` of a stage is of one of its `pieces`."""
    return any(name == part or name.startswith(f"{part}.") for part in piece)


def numbered(prefix: str, layers: nn.ModuleList) -> tuple[tuple[str, ...], ...]:
    """A piece of each of `layers`."""
    return tuple((f"{prefix}.{number}",) for number in range(len(layers)))
