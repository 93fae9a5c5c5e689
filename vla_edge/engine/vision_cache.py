"""Frame-to-frame caching: the tokens of a picture are used again for a later one in which hardly anything has changed.

Each picture is compared with the one its camera's tokens were made of, not with the one before it, so that slow drift
adds up; and block by block, so that a hand that moves in one corner is a change however still the rest is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_edge.types import NANOSECONDS

# Blocks along each side of a picture.
BLOCKS = 16
MOST_AGE_NS = NANOSECONDS
"""Tokens are not used for longer than this, whatever is to be seen."""


def change(picture: np.ndarray, other: np.ndarray, scale: Sequence[float] = (0.5, 0.5, 0.5)) -> float:
    """Mean absolute difference of the block that differs most, 0 to 1.

    Args:
        picture, other: (1, 3, H, W) as the network sees them. scale: of each channel, see `policy.spec.CameraSpec`.
    """
    difference = np.tensordot(np.asarray(scale, np.float32), np.abs(picture[0] - other[0]), 1)
    counts = []
    for axis, length in enumerate(difference.shape):
        edges = np.unique(np.linspace(0, length, BLOCKS, endpoint=False).astype(int))
        difference = np.add.reduceat(difference, edges, axis)
        counts.append(np.diff([*edges, length]))
    return float((difference / np.outer(*counts)).max() / picture.shape[1])


class VisionCache:
    """Which cameras need not be looked at again.

    Args:
        most_change: up to which tokens are used again, as of `change`.
        scales: of each camera's pixels.
    """

    def __init__(self, most_change: float, scales: Sequence[Sequence[float]] = ((0.5, 0.5, 0.5),)):
        self._most, self._scales = most_change, scales
        self._seen: dict[int, tuple[int, np.ndarray]] = {}  # picture's place -> stamp and picture that its tokens are of

    def again(self, pictures: Sequence[np.ndarray], stamp_ns: int) -> frozenset[int]:
        """Places of the cameras whose tokens hold for `pictures`, which come later; the others are taken to be looked at.

        What does not come later is no new frame, and is looked at: one observation timed many times costs what it costs.
        """
        held = set()
        for place, picture in enumerate(pictures):
            then_ns, seen = self._seen.get(place, (0, None))
            age, scale = stamp_ns - then_ns, self._scales[place % len(self._scales)]
            if seen is not None and 0 < age <= MOST_AGE_NS and change(picture, seen, scale) <= self._most:
                held.add(place)
            elif seen is None:
                self._seen[place] = stamp_ns, picture.copy()
            else:
                seen[...] = picture
                self._seen[place] = stamp_ns, seen
        return frozenset(held)

    def forget(self) -> None:
        """The tokens are others', or none."""
        self._seen.clear()
