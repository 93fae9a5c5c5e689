"""A progress bar for long work, readable in a terminal and in a log."""

from __future__ import annotations

import os
import sys
import time


class Bar:
    """A progress bar on standard error: redrawn in a terminal, one line a step elsewhere. Where work takes minutes it says
    how much longer; where it leaps ahead, work was done before, of which nothing follows for the rest."""

    WIDTH = 28
    WORTH_SAYING_S = 60.0
    LEAP = 0.05

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._begin, self._step = time.monotonic(), ""
        self._since, self._last = (0.0, self._begin), 0.0  # fraction and time that the estimate begins at; the last fraction

    def __call__(self, fraction: float, step: str = "") -> None:
        fraction = min(max(fraction, 0.0), 1.0)
        times = self._times(fraction)
        if self._live:
            full = round(self.WIDTH * fraction)
            bar = "\u2588" * full + "\u2591" * (self.WIDTH - full)
            self._stream.write(f"\r\x1b[K{bar} {100 * fraction:3.0f} %  {times}  {step}")
            self._stream.flush()
        elif step.rstrip("0123456789 ") != self._step:
            self._step = step.rstrip("0123456789 ")
            if not step[:1].isdigit():
                print(f"{100 * fraction:3.0f} %  {times}  {step}", file=self._stream)

    def _times(self, fraction: float) -> str:
        """Since the beginning, and until the end where that can be told and is worth telling."""
        now = time.monotonic()
        told = f"{now - self._begin:5.1f} s"
        if not 0 <= fraction - self._last < self.LEAP:
            self._since = fraction, now
        self._last = fraction
        done, spent = fraction - self._since[0], now - self._since[1]
        left = spent * (1 - fraction) / done if done > 0.01 else 0.0
        return f"{told}, {left / 60:.0f} min left" if spent > 5 and left > self.WORTH_SAYING_S else told

    def close(self) -> None:
        """Ends the line."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
