"""Images and joint states read in place, from their serialized form: a frame that is not used costs one copy and no more,
joint states of hundreds a second a tenth of what a message of Python objects does.

The layout is OMG CDR (version 1, as every ROS 2 middleware sends it): four bytes that tell the byte order, then the
fields in the order of the message definition, each aligned to its own size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from vla_edge.types import NANOSECONDS, VlaEdgeError


class WireError(VlaEdgeError):
    """Bytes that are not the message they came as."""


@dataclass(frozen=True)
class WireImage:
    """sensor_msgs/Image or CompressedImage; `data` is a view of the bytes that were received.

    Attributes:
        stamp_ns: of the header.
        encoding: of pixels, or the `format` of a compressed image.
        height, width, step: zero for a compressed image.
    """

    stamp_ns: int
    encoding: str
    height: int
    width: int
    step: int
    data: memoryview


class _Reader:
    def __init__(self, data: bytes):
        self._data, self._at = memoryview(data), 4
        if len(data) < 4 or data[0] != 0 or data[1] not in (0, 1):
            raise WireError("a message is not in CDR; is its publisher another middleware's?")
        self._order = "<" if data[1] else ">"

    def number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        self._at += -(self._at - 4) % size
        try:
            (value,) = struct.unpack_from(self._order + kind, self._data, self._at)
        except struct.error as error:
            raise WireError(f"a message is cut short: {error}; it was damaged on its way") from None
        self._at += size
        return value

    def block(self) -> memoryview:
        length = self.number("I")
        block = self._data[self._at : self._at + length]
        if len(block) != length:
            raise WireError(f"a message announces {length} bytes and has {len(block)}; it was cut on its way")
        self._at += length
        return block

    def text(self) -> str:
        return bytes(self.block()).rstrip(b"\0").decode(errors="replace")

    def header(self) -> int:
        """Its stamp in ns; the frame is passed over."""
        stamp_ns = self.number("i") * NANOSECONDS + self.number("I")
        self.block()
        return stamp_ns

    def names(self, known: tuple[bytes, tuple[str, ...]]) -> tuple[bytes, tuple[str, ...]]:
        """Texts and the bytes they were in; `known` itself where those come again."""
        self._at += -(self._at - 4) % 4
        begin, end = self._at, self._at + len(known[0])
        if known[0] and self._data[begin:end] == known[0]:
            self._at = end
            return known
        found = tuple(self.text() for _ in range(self.number("I")))
        return bytes(self._data[begin : self._at]), found

    def doubles(self) -> np.ndarray:
        count = self.number("I")
        if not count:
            return np.empty(0)
        self._at += -(self._at - 4) % 8
        if len(self._data) < self._at + 8 * count:
            raise WireError(f"a message announces {count} numbers and is shorter; it was cut on its way")
        values = np.frombuffer(self._data, self._order + "f8", count, self._at)
        self._at += 8 * count
        return values


def read_image(data: bytes, compressed: bool = False) -> WireImage:
    """The image in a serialized message.

    Raises:
        WireError: the bytes are not such a message.
    """
    reader = _Reader(data)
    stamp_ns = reader.header()
    if compressed:
        return WireImage(stamp_ns, reader.text(), 0, 0, 0, reader.block())
    height, width, encoding = reader.number("I"), reader.number("I"), reader.text()
    reader.number("B")  # is_bigendian means nothing for bytes
    return WireImage(stamp_ns, encoding, height, width, reader.number("I"), reader.block())


class JointStates:
    """sensor_msgs/JointState in place. Names, which hardly ever change, are compared as bytes, and the same tuple then."""

    def __init__(self):
        self._names: tuple[bytes, tuple[str, ...]] = b"", ()

    def __call__(self, data: bytes) -> tuple[int, tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]:
        """Stamp in ns, names, positions, velocities and efforts; the arrays look at `data`.

        Raises:
            WireError: the bytes are not such a message.
        """
        reader = _Reader(data)
        stamp_ns = reader.header()
        self._names = reader.names(self._names)
        return stamp_ns, self._names[1], reader.doubles(), reader.doubles(), reader.doubles()
