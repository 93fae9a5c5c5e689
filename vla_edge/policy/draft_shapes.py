"""Shapes of what proposes tokens of actions (`openvla_draft`), and those it has unless something else is asked for."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK, MEDUSA = "block", "medusa"
TOKENS = 4  # proposed at a time, where nobody says how many
WIDTH, LAYERS, HEAD_DIM = 256, 1, 16  # of a block; its tensors do not tell the last
HIDDEN = 3  # times the width


@dataclass(frozen=True)
class DraftConfig:
    """Shapes of a draft.

    Attributes:
        kind: BLOCK or MEDUSA.
        feature: width of what it is told. places: tokens of a chunk.
        layers: of a block, or of each of Medusa's heads before its last.
        most_tokens: that it can propose.
        width, hidden: of a block's layers, a multiple of `HEAD_DIM`; Medusa's are as wide as the feature.
    """

    kind: str
    feature: int
    places: int
    layers: int
    most_tokens: int
    width: int = 0
    hidden: int = 0
