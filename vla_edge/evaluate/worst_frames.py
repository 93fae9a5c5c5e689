"""The frames with the largest errors, with their pictures: what people look at first."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from vla_edge.evaluate.evaluation import Snapshot

# Enough to look at, little enough to mail.
MOST = 6
SPACING_S = 2.0


class WorstFrames:
    """Keeps the worst, at most one of each stretch of `SPACING_S`."""

    def __init__(self):
        # (error, frame, s, pictures), worst first
        self._kept: list[tuple[float, int, float, Mapping[str, bytes]]] = []

    def offer(self, error: float, frame: int, time_s: float, images: Mapping[str, np.ndarray]) -> None:
        """One frame; a picture is made of it only if it is among the worst so far."""
        if not math.isfinite(error):
            return
        near = [kept for kept in self._kept if abs(kept[2] - time_s) < SPACING_S]
        if any(kept[0] >= error for kept in near):
            return
        self._kept = [kept for kept in self._kept if kept not in near]
        if len(self._kept) >= MOST and self._kept[-1][0] >= error:
            return
        self._kept.append((error, frame, time_s, {name: thumbnail(pixels) for name, pixels in images.items()}))
        self._kept = sorted(self._kept, key=lambda kept: (-kept[0], kept[1]))[:MOST]

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Worst first."""
        return tuple(Snapshot(frame, pictures) for _, frame, _, pictures in self._kept)


def thumbnail(pixels: np.ndarray, width: int = 320) -> bytes:
    """JPEG bytes of an RGB frame, at most `width` pixels wide."""
    import cv2

    height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA) if pixels.shape[1] > width else pixels
    return cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
