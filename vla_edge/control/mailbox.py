"""Latest values across processes without a lock: a writer never waits for a reader, nor a reader for a writer.

Each mailbox is a sequence lock in shared memory (odd while being written) whose payload carries a checksum. The
sequence alone would do on x86; on ARM, where Python offers no memory barrier, the checksum is what tells a torn or
reordered copy. A reader that meets either keeps what it had and looks again at its next tick.
"""

from __future__ import annotations

import mmap
import os
import zlib

import numpy as np

_HEADER = np.dtype([("sequence", "<u8"), ("length", "<u8"), ("checksum", "<u8")])
_ALIGN = 64


class Mailbox:
    """The latest record of one kind; one writer process, any number of readers.

    Args:
        memory: shared bytes of `size(dtype)`.
        dtype: structured type of the record. Its last field may be cut short by `post(length)`.

    Attributes:
        record: this side's private copy, a 0-d structured array.
        fields: name -> view into `record`, cheaper than `record[name]`.
    """

    def __init__(self, memory: memoryview, dtype: np.dtype):
        self.record = np.zeros((), dtype)
        self.fields = {name: self.record[name] for name in dtype.names}
        self._private = memoryview(self.record.reshape(1).view(np.uint8))
        self._header = memory[: _HEADER.itemsize].cast("Q")
        self._shared = memory[_HEADER.itemsize : _HEADER.itemsize + dtype.itemsize]
        self._seen = 0

    @staticmethod
    def size(dtype: np.dtype) -> int:
        """Bytes of shared memory one mailbox takes."""
        return -(-(_HEADER.itemsize + dtype.itemsize) // _ALIGN) * _ALIGN

    def post(self, length: int | None = None) -> None:
        """Publish `record`, or its first `length` bytes."""
        header, length = self._header, length or len(self._private)
        part = self._private[:length]
        sequence = header[0] | 1
        header[0] = sequence
        self._shared[:length] = part
        header[1] = length
        header[2] = zlib.crc32(part, sequence & 0xFFFF)
        header[0] = sequence + 1

    def fetch(self) -> bool:
        """Bring `record` up to date; False when there is nothing new or it is just being written."""
        header = self._header
        sequence = header[0]
        if sequence == self._seen or sequence & 1:
            return False
        length, checksum = header[1], header[2]
        if length > len(self._private):
            return False
        copy = bytes(self._shared[:length])
        if header[0] != sequence or zlib.crc32(copy, (sequence - 1) & 0xFFFF) != checksum:
            return False
        self._private[:length] = copy
        self._seen = sequence
        return True


class SharedBlock:
    """Mailboxes in one block of anonymous shared memory, handed to a child process as a file descriptor.

    Args:
        layout: name -> structured type, equal on both sides.
        descriptor: of an existing block; None makes a new one.
    """

    def __init__(self, layout: dict[str, np.dtype], descriptor: int | None = None):
        size = sum(Mailbox.size(dtype) for dtype in layout.values())
        self.descriptor = os.memfd_create("vla_edge_mailboxes") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, size)
        self._memory = mmap.mmap(self.descriptor, size)
        view, start = memoryview(self._memory), 0
        self.boxes: dict[str, Mailbox] = {}
        for name, dtype in layout.items():
            self.boxes[name] = Mailbox(view[start : start + Mailbox.size(dtype)], dtype)
            start += Mailbox.size(dtype)

    def __getitem__(self, name: str) -> Mailbox:
        return self.boxes[name]

    def close(self) -> None:
        """Give the descriptor back; the memory goes when the last view of it does."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
