"""Drafts that cost nothing: the tokens of earlier chunks, proposed for the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

MOST_CHUNKS = 256


class ChunkHistory:
    """The last chunks. Of those, the one that is nearest to what is decoded so far tells how it may go on: retrieval as in
    REST (He et al., 2023, arXiv:2311.08252), by distance between bins in the place of equal words, since near bins are near
    actions.

    Args:
        chunks: that are remembered. tokens: of each.
    """

    def __init__(self, chunks: int, tokens: int):
        self._chunks: deque[np.ndarray] = deque(maxlen=chunks)
        self._tokens = tokens

    def add(self, chunk: Sequence[int]) -> None:
        """One more, the newest."""
        self._chunks.append(np.array(chunk, np.int64))

    def propose(self, known: Sequence[int], count: int) -> np.ndarray:
        """At most `count` tokens that may follow the `known` first ones of a chunk; fewer near its end, none at first."""
        if not self._chunks:
            return np.zeros(0, np.int64)
        chunks = np.stack(self._chunks)[::-1]  # of equally near ones the newest
        nearest = np.abs(chunks[:, : len(known)] - np.asarray(known)).sum(1).argmin()
        return chunks[nearest, len(known) : len(known) + count]
