"""Messages out of a bag's files, whatever container they are in and wherever the recording was cut.

rosbag2 directories and single files (MCAP, sqlite3; zstd by message, chunk or file) and ROS 1 bags are read through
`rosbags`, with no ROS installed. An MCAP file that a recorder never closed has no index: it is then scanned from its
beginning, and everything before the damage is used. Payloads stay serialized until somebody asks for them.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vla_edge.evaluate.mcap_scan import ScannedMessage, decompressed, message_payload, scan
from vla_edge.types import NANOSECONDS, VlaEdgeError


class BagError(VlaEdgeError):
    """A bag that cannot be read, or that lacks what its evaluation needs."""


class RawMessage(NamedTuple):
    """One recorded message: `log_ns` is when the recorder received it, `data` its serialized form."""

    topic: str
    msgtype: str
    log_ns: int
    data: bytes


class Storage:
    """Reads one bag as a stream of raw messages.

    Args:
        path: a rosbag2 directory, an `.mcap`, `.db3` or ROS 1 `.bag` file.

    Attributes:
        topics: topic -> message type.
        counts: topic -> number of messages.
        start_ns, end_ns: log time of the first and of the last message, 0 in an empty bag.
        warnings: what had to be repaired or left out, complete once `messages` is exhausted.

    Raises:
        BagError: there is no bag at `path`, or nothing in it can be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise BagError(f"there is no bag at {self.path}; give a rosbag2 directory, an .mcap, .db3 or .bag file")
        self.warnings: list[str] = []
        for file in self.path.glob("*.db3") if self.path.is_dir() else [self.path]:
            if (lost := _lost_bytes(file)) > 0:
                # sqlite3 takes what is missing for zeros, and would give them out as measurements.
                raise BagError(
                    f"{file} was cut: its last {lost} bytes are missing; repair it with `sqlite3 FILE .recover`"
                )
        self._reader = _Indexed(self.path) if _looks_like_bag(self.path) else None
        problem = self._reader.open() if self._reader else "it holds no metadata.yaml"
        if problem:
            self._reader = self._salvage(problem)
        self.topics: dict[str, str] = self._reader.topics
        self.counts: Counter[str] = self._reader.counts
        self.start_ns, self.end_ns = self._reader.span

    def _salvage(self, problem: str) -> _Scanned:
        files = sorted(self.path.glob("*.mcap*")) if self.path.is_dir() else [self.path]
        scanned = _Scanned([file for file in files if file.name.endswith((".mcap", ".mcap.zstd"))])
        if not sum(scanned.counts.values()):
            sqlite = self.path.suffix == ".db3" or any(self.path.glob("*.db3*"))
            tool = "`sqlite3 FILE .recover`" if sqlite else "`mcap recover`"
            tool = "`rosbag reindex`" if self.path.suffix == ".bag" else tool
            raise BagError(f"bag {self.path} cannot be read: {problem}; record it again or repair it with {tool}")
        self.warnings.append(
            f"the bag has no usable index ({problem}); {sum(scanned.counts.values())} messages up to "
            f"{(scanned.span[1] - scanned.span[0]) / NANOSECONDS:.1f} s were recovered by scanning"
        )
        return scanned

    def messages(self, topics: set[str]) -> Iterator[RawMessage]:
        """The messages of `topics` in the order they were recorded, up to the end or to the first damage."""
        last_ns = self.start_ns
        try:
            for message in self._reader.messages(topics):
                last_ns = message.log_ns
                yield message
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except Exception as error:  # noqa: BLE001 - what a decoder raises on damaged bytes is not bounded
            self.warnings.append(
                f"the bag is damaged {(last_ns - self.start_ns) / NANOSECONDS:.1f} s after its start "
                f"({_one_line(error)}); what comes after was left out"
            )

    @property
    def ros1(self) -> bool:
        """Whether payloads are in ROS 1's serialization."""
        return self._reader.ros1

    def deserialize(self, message: RawMessage):
        """The message as an object with ROS field names.

        Raises:
            BagError: its bytes do not fit its definition.
        """
        try:
            return self._reader.deserialize(message.data, message.msgtype)
        except Exception as error:  # noqa: BLE001 - as above
            raise BagError(
                f"a {message.msgtype} on {message.topic} does not decode ({_one_line(error)}); "
                "the bag is damaged or was recorded with another definition of the message"
            ) from None

    @property
    def metadata(self) -> dict[str, str]:
        """Text that the recorder kept beside the messages, as `vla_edge.manifest`; empty where there is none."""
        import yaml

        try:
            content = yaml.safe_load((self.path / "metadata.yaml").read_text(encoding="utf-8"))
            return dict(content["rosbag2_bagfile_information"].get("custom_data") or {})
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError):
            return {}

    def fields(self, msgtype: str) -> tuple[str, ...]:
        """Names of the fields of a type as this bag defines it, in order; empty where it does not."""
        return tuple(name for name, _ in self._reader.typestore.fielddefs.get(msgtype, ((), ()))[1])

    def header_stamp(self, message: RawMessage) -> int:
        """ns of the message's leading std_msgs/Header without decoding the rest; the log time where it was never set.

        Raises:
            BagError: the payload is shorter than a header.
        """
        try:
            if self._reader.ros1:
                seconds, nanoseconds = struct.unpack_from("<II", message.data, 4)
            else:
                order = "<" if message.data[1] & 1 else ">"
                seconds, nanoseconds = struct.unpack_from(order + "iI", message.data, 4)
        except (struct.error, IndexError):
            raise BagError(f"a {message.msgtype} on {message.topic} is cut short; record the bag again") from None
        return seconds * NANOSECONDS + nanoseconds or message.log_ns

    def close(self) -> None:
        """Lets go of the files."""
        self._reader.close()

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Indexed:
    """A bag as its recorder meant it to be read."""

    def __init__(self, path: Path):
        self._path = path
        self._any = None
        self.ros1 = path.suffix == ".bag"

    def open(self) -> str:
        """'' when the bag is open, otherwise why it cannot be opened."""
        try:
            self._any, self._opened_by = self._reader(), threading.get_ident()
            self._any.open()
        except Exception as error:  # noqa: BLE001 - sqlite, yaml, struct, zstd and unicode errors all mean the same
            self._any = None
            return _one_line(error)
        self.topics = {connection.topic: connection.msgtype for connection in self._any.connections}
        self.counts = Counter()
        for connection in self._any.connections:
            self.counts[connection.topic] += connection.msgcount
        filled = self._any.message_count > 0
        self.span = (self._any.start_time, self._any.end_time - 1) if filled else (0, 0)
        return ""

    def messages(self, topics: set[str]) -> Iterator[RawMessage]:
        if threading.get_ident() == self._opened_by:
            yield from self._of(self._any, topics)
        else:
            # sqlite3 answers only the thread that opened it.
            with self._reader() as own:
                yield from self._of(own, topics)

    @staticmethod
    def _of(reader, topics: set[str]) -> Iterator[RawMessage]:
        wanted = [connection for connection in reader.connections if connection.topic in topics]
        if wanted:
            for connection, log_ns, data in reader.messages(wanted):
                yield RawMessage(connection.topic, connection.msgtype, log_ns, data)

    def _reader(self):
        from rosbags.highlevel import AnyReader
        from rosbags.typesys import Stores, get_typestore

        # sqlite3 bags before Iron carry no definitions; those of the standard messages have not changed since.
        default = None if self.ros1 else get_typestore(Stores.ROS2_HUMBLE)
        return AnyReader([self._path], default_typestore=default)

    def deserialize(self, data: bytes, msgtype: str):
        return self._any.deserialize(data, msgtype)

    @property
    def typestore(self):
        return self._any.typestore

    def close(self) -> None:
        if self._any is not None:
            self._any.close()
            self._any = None


class _Scanned:
    """MCAP files without an index, read record by record from the beginning of each."""

    ros1 = False

    def __init__(self, files: list[Path]):
        from rosbags.typesys import Stores, get_typestore

        self._files = files
        self.typestore = get_typestore(Stores.EMPTY)
        self.topics: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        first, last = 0, 0
        for message in self.messages(None):
            self.topics[message.topic] = message.msgtype
            self.counts[message.topic] += 1
            first = min(first or message.log_ns, message.log_ns)
            last = max(last, message.log_ns)
        self.span = (first, last)

    def messages(self, topics: set[str] | None) -> Iterator[RawMessage]:
        for file in self._files:
            with open(file, "rb") as stream:
                yield from self._scan(stream if file.suffix == ".mcap" else decompressed(stream), topics)

    def _scan(self, stream, topics: set[str] | None) -> Iterator[RawMessage]:
        types: dict[int, str] = {}
        for record in scan(stream):
            if not isinstance(record, ScannedMessage):
                if self._learn(record):
                    types[record.id] = record.name
            elif record.schema_id in types and (topics is None or record.topic in topics):
                yield RawMessage(record.topic, types[record.schema_id], record.log_ns, message_payload(record.data))

    def _learn(self, schema) -> bool:
        """Registers a message definition; False when it makes no sense."""
        from rosbags.typesys import get_types_from_idl, get_types_from_msg

        if schema.name in self.typestore.fielddefs:
            return True
        text = schema.definition
        try:
            parsed = get_types_from_msg(text, schema.name) if schema.encoding == "ros2msg" else get_types_from_idl(text)
            self.typestore.register(parsed)
        except Exception:  # noqa: BLE001 - parsing damaged text fails in as many ways as there are kinds of damage
            return False
        return True

    def deserialize(self, data: bytes, msgtype: str):
        return self.typestore.deserialize_cdr(data, msgtype)

    def close(self) -> None:
        """Nothing is held open between scans."""


def _lost_bytes(file: Path) -> int:
    """Of a sqlite3 file, by the number of pages its header announces; 0 for any other file."""
    with open(file, "rb") as stream:
        head = stream.read(100)
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        return 0
    page_size, pages = struct.unpack_from(">H", head, 16)[0], struct.unpack_from(">I", head, 28)[0]
    return (page_size if page_size > 1 else 65536) * pages - file.stat().st_size


def _looks_like_bag(path: Path) -> bool:
    return path.is_file() or (path / "metadata.yaml").exists()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{text[:160] or type(error).__name__}".rstrip(".")
