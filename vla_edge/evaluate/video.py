"""Frames of a video file by their time, decoded by PyAV (FFmpeg), which reads every codec that LeRobot writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_edge.evaluate.lerobot_files import DatasetError

# further ahead than this a jump to the key frame before is cheaper than decoding all frames on the way
MOST_AHEAD_S = 1.0


class Video:
    """One video file, opened.

    Raises:
        DatasetError: it is missing or damaged, or PyAV is not installed.
    """

    def __init__(self, path: Path):
        try:
            import av
        except ImportError as error:
            raise DatasetError(
                f"videos are decoded with PyAV, which cannot be imported ({error}); run pip install av"
            ) from error
        self.path, self._errors = path, (av.FFmpegError, OSError)
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except FileNotFoundError:
            raise DatasetError(f"the dataset lacks {path}; copy it again") from None
        except (*self._errors, IndexError) as error:
            raise DatasetError(f"video {path} cannot be read ({error}); copy it again") from error
        self._frames, self._newest = iter(()), None

    def at(self, seconds: float, within: float) -> np.ndarray:
        """(H, W, 3) uint8 RGB: the frame whose time is `seconds`, give or take less than `within`.

        Raises:
            DatasetError: there is none, or it does not decode.
        """
        try:
            frame = self._find(seconds, within)
        except self._errors as error:
            raise DatasetError(
                f"video {self.path} does not decode at {seconds:.3f} s ({error}); copy it again"
            ) from error
        if frame is None or abs(frame.time - seconds) >= within:
            raise DatasetError(f"video {self.path} has no frame at {seconds:.3f} s; copy the dataset again")
        return frame.to_ndarray(format="rgb24")

    def close(self) -> None:
        """Lets go of the file."""
        self._container.close()

    def _find(self, seconds: float, within: float):
        """The first frame that is not before `seconds - within`, None where the video ends before."""
        newest = self._newest
        if newest is None or not newest.time - within < seconds < newest.time + MOST_AHEAD_S:
            self._seek(seconds)
            if self._advance() is not None and self._newest.time >= seconds + within:
                # the index sent us past it: from the beginning, then
                self._seek(0.0)
                self._advance()
        while self._newest is not None and self._newest.time <= seconds - within:
            self._advance()
        return self._newest

    def _seek(self, seconds: float) -> None:
        self._container.seek(int(seconds / self._stream.time_base), stream=self._stream)
        self._frames = self._container.decode(self._stream)

    def _advance(self):
        self._newest = next((frame for frame in self._frames if frame.time is not None), None)
        return self._newest
