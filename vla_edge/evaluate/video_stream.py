"""Video that a bag carries packet by packet -> frames with their stamps, decoded by PyAV (FFmpeg).

A packet says what changed since the last, so every one has to be decoded, also those whose frame nobody uses; only what
is used becomes an RGB array.
"""

from __future__ import annotations

from collections import Counter

from vla_edge.evaluate.storage import BagError
from vla_edge.observe.image import ImageEncodingError
from vla_edge.types import NANOSECONDS

COMPRESSED_VIDEO, FFMPEG_PACKET = "foxglove_msgs/msg/CompressedVideo", "ffmpeg_image_transport_msgs/msg/FFMPEGPacket"
VIDEO = (COMPRESSED_VIDEO, FFMPEG_PACKET)
# What messages call a codec (ffmpeg_image_transport names the encoder that was used) -> FFmpeg's decoder of it.
_DECODERS = {"h265": "hevc", "x264": "h264", "x265": "hevc", "svtav1": "av1", "aom": "av1"}
_KNOWN = ("h264", "hevc", "av1", "vp8", "vp9", "mjpeg", "mpeg4")


def decoder_name(told: str) -> str:
    """FFmpeg's name of the codec that a message calls `told`: h265, libx264, h264_nvenc, "hevc;nv12;bgr8".

    Raises:
        ImageEncodingError: none that is known.
    """
    name = told.split(";")[0].strip().lower().removeprefix("lib").partition("_")[0]
    name = _DECODERS.get(name, name)
    if name not in _KNOWN:
        raise ImageEncodingError(f"video in {told!r} is not read; record one of {', '.join(_KNOWN)}, or pictures")
    return name


class VideoStream:
    """The packets of one camera, in the order they were recorded.

    Args:
        camera: its name, for `skipped`. skipped: counts packets of which no frame came, by reason.

    Raises:
        BagError: PyAV is not installed.
    """

    def __init__(self, camera: str, skipped: Counter[str]):
        try:
            import av
        except ImportError as error:
            raise BagError(
                f"video in bags is decoded with PyAV, which cannot be imported ({error}); run pip install av"
            ) from error
        self._av, self._camera, self._skipped = av, camera, skipped
        self._decoder = self._codec = None
        self._waiting = 0

    def push(self, stamp_ns: int, told: str, data) -> list[tuple[int, object]]:
        """The frames that are complete now, (stamp, frame); `pixels` makes arrays of them.

        Args:
            told: the codec, as the message has it. data: of the packet.

        Raises:
            ImageEncodingError: the codec is not known.
        """
        from fractions import Fraction

        if told != self._codec:
            self._decoder = self._av.CodecContext.create(decoder_name(told), "r")
            # a frame for each packet where the video allows it: threads for whole frames hold some back
            self._decoder.thread_type = "SLICE"
            self._codec = told
        packet = self._av.Packet(bytes(data))
        packet.pts = packet.dts = stamp_ns
        packet.time_base = Fraction(1, NANOSECONDS)
        self._waiting += 1
        return self._decoded(packet)

    def end(self) -> list[tuple[int, object]]:
        """Frames that were held back until now; packets of which none came are counted."""
        found = [] if self._decoder is None else self._decoded(None)
        if self._waiting > 0:
            self._skipped[f"packet of camera {self._camera} of which no frame came"] += self._waiting
        self._waiting = 0
        return found

    def _decoded(self, packet) -> list[tuple[int, object]]:
        try:
            frames = [frame for frame in self._decoder.decode(packet) if frame.pts is not None]
        except self._av.FFmpegError:
            return []
        self._waiting -= len(frames)
        return [(frame.pts, frame) for frame in frames]


def pixels(frame):
    """(H, W, 3) uint8 RGB of a frame of `VideoStream`."""
    return frame.to_ndarray(format="rgb24")
