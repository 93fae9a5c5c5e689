"""A table that grows by a row for each frame of a recording, however long that is."""

from __future__ import annotations

import numpy as np


class Rows:
    """A growing array of equal rows, float32, without an object for each: an hour of frames is a few MB.

    Args:
        shape: of a row.
    """

    BLOCK = 1024

    def __init__(self, shape: tuple[int, ...]):
        self._shape, self._blocks, self._count = shape, [], 0

    def __len__(self) -> int:
        return self._count

    def add(self, row) -> None:
        """Appends a row."""
        if self._count % self.BLOCK == 0:
            self._blocks.append(np.empty((self.BLOCK, *self._shape), np.float32))
        self._blocks[-1][self._count % self.BLOCK] = row
        self._count += 1

    def array(self) -> np.ndarray:
        """(N, ...) all rows."""
        return np.concatenate([*self._blocks, np.empty((0, *self._shape), np.float32)])[: self._count]
