"""A progress bar for long work, readable in a terminal and in a log."""

from __future__ import annotations

import os
import sys
import time


class Bar:
    """A progress bar on standard error: redrawn in a terminal, one line a step elsewhere."""

    WIDTH = 28

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._begin, self._step = time.monotonic(), ""

    def __call__(self, fraction: float, step: str = "") -> None:
        fraction = min(max(fraction, 0.0), 1.0)
        if self._live:
            full = round(self.WIDTH * fraction)
            bar = "\u2588" * full + "\u2591" * (self.WIDTH - full)
            self._stream.write(
                f"\r\x1b[K{bar} {100 * fraction:3.0f} %  {time.monotonic() - self._begin:5.1f} s  {step}"
            )
            self._stream.flush()
        elif step.rstrip("0123456789 ") != self._step:
            self._step = step.rstrip("0123456789 ")
            if not step[:1].isdigit():
                print(f"{100 * fraction:3.0f} %  {time.monotonic() - self._begin:5.1f} s  {step}", file=self._stream)

    def close(self) -> None:
        """Ends the line."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
