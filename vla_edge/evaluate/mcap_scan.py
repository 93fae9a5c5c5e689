"""Reads an MCAP file from its beginning to wherever it ends, with no index: what a recorder that died leaves behind.

Follows the MCAP specification, version 0: a file is a sequence of records (opcode, length, content), a chunk a record
that holds further records, compressed or not. Even of a chunk that is cut short the messages before the cut are used.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAGIC = b"\x89MCAP0\r\n"
SCHEMA, CHANNEL, MESSAGE, CHUNK = 0x03, 0x04, 0x05, 0x06
# A record longer than this is a damaged length, not something to make room for.
LONGEST = 1 << 30
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class ScannedSchema(NamedTuple):
    """Definition of a message type: encoding is "ros2msg" or "ros2idl"."""

    id: int
    name: str
    encoding: str
    definition: str


class ScannedMessage(NamedTuple):
    """One message of a channel; `log_ns` is when it was received."""

    topic: str
    schema_id: int
    log_ns: int
    data: bytes


def scan(stream: BinaryIO) -> Iterator[ScannedSchema | ScannedMessage]:
    """Schemas and messages in file order, up to the first byte that makes no sense. Raises nothing for damage."""
    if _read(stream, len(MAGIC)) != MAGIC:
        return
    channels: dict[int, tuple[str, int]] = {}
    while True:
        head = _read(stream, 9)
        if len(head) < 9:
            return
        opcode, length = struct.unpack("<BQ", head)
        if length > LONGEST:
            return
        if opcode in (SCHEMA, CHANNEL, MESSAGE, CHUNK):
            content = _read(stream, length)
            whole = len(content) == length
            try:
                if opcode == CHUNK:
                    records, intact = _unpack_chunk(content, whole)
                    yield from _inside(records, channels)
                    if not intact:
                        return
                elif whole:
                    yield from _record(opcode, content, channels)
            except (struct.error, UnicodeDecodeError, IndexError, KeyError, OverflowError):
                return
            if not whole:
                return
        elif len(_read(stream, length)) < length:
            return


def decompressed(stream: BinaryIO) -> BinaryIO:
    """What is inside a file that was compressed as a whole by zstd, as far as it goes."""
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)


def message_payload(data: bytes) -> bytes:
    """A message as it was before rosbag2 compressed it by itself; CDR never begins as zstd does."""
    return data if data[:4] != ZSTD_MAGIC else _decompress(data, "zstd")


def _read(stream: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes; fewer at the end and at damage."""
    try:
        return stream.read(size)
    except (OSError, *_zstd_errors()):
        return b""


def _unpack_chunk(content: bytes, whole: bool) -> tuple[bytes, bool]:
    """The records of a chunk, and whether they are all there and unharmed."""
    size, crc, name_length = struct.unpack_from("<QII", content, 16)
    compression = content[32 : 32 + name_length].decode()
    start = 32 + name_length + 8
    (stored,) = struct.unpack_from("<Q", content, start - 8)
    payload = content[start : start + stored]
    records = _decompress(payload, compression)
    if whole and len(records) == size:
        intact = not crc or zlib.crc32(records) == crc
        return (records if intact else b""), intact
    # A cut compressed chunk decodes up to the cut; one that is whole but does not decode is damaged somewhere unknown.
    return (b"" if whole else records), False


def _decompress(payload: bytes, compression: str) -> bytes:
    if compression == "":
        return payload
    try:
        if compression == "zstd":
            import zstandard

            return zstandard.ZstdDecompressor().decompressobj().decompress(payload)
        if compression == "lz4":
            import lz4.frame

            return lz4.frame.LZ4FrameDecompressor().decompress(payload)
    except (RuntimeError, ValueError, zlib.error, *_zstd_errors()):
        pass
    return b""


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _inside(records: bytes, channels: dict) -> Iterator[ScannedSchema | ScannedMessage]:
    offset = 0
    while offset + 9 <= len(records):
        opcode, length = struct.unpack_from("<BQ", records, offset)
        offset += 9
        if offset + length > len(records):
            return
        if opcode in (SCHEMA, CHANNEL, MESSAGE):
            yield from _record(opcode, records[offset : offset + length], channels)
        offset += length


def _record(opcode: int, content: bytes, channels: dict) -> Iterator[ScannedSchema | ScannedMessage]:
    if opcode == MESSAGE:
        channel, _, log_ns, _ = struct.unpack_from("<HIQQ", content)
        if channel in channels:
            topic, schema_id = channels[channel]
            yield ScannedMessage(topic, schema_id, log_ns, content[22:])
    elif opcode == CHANNEL:
        number, schema_id = struct.unpack_from("<HH", content)
        channels[number] = (_string(content, 4)[0], schema_id)
    else:
        (number,) = struct.unpack_from("<H", content)
        name, offset = _string(content, 2)
        encoding, offset = _string(content, offset)
        yield ScannedSchema(number, name, encoding, _string(content, offset)[0])


def _string(content: bytes, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", content, offset)
    end = offset + 4 + length
    return content[offset + 4 : end].decode(), end
