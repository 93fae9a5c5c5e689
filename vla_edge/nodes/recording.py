"""Serialized messages into a rosbag2 MCAP directory, in a thread of its own, without rosbag2.

Written by `rosbags`, so a bag is closed with its index and metadata.yaml and `ros2 bag play` takes it.
"""

from __future__ import annotations

import queue
import shutil
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from vla_edge.types import NANOSECONDS, VlaEdgeError

# Version 8 of the metadata is what Iron, Jazzy and later read alike.
METADATA_VERSION = 8
# Messages waiting for the disk; beyond it they are dropped and counted, so that memory stays bounded.
MAX_WAITING = 20_000


class RecordingError(VlaEdgeError):
    """A bag that cannot be written."""


class Recording:
    """One bag being written. `write` returns at once.

    Args:
        path: directory to create.
        overwrite: replace a bag that is there; anything else is never touched.
        metadata: text kept in the bag's metadata.

    Attributes:
        written: topic -> messages on disk.
        dropped: topic -> messages the disk was too slow for.

    Raises:
        RecordingError: something is at `path`.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, metadata: Mapping[str, str] | None = None):
        from rosbags.rosbag2 import StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore

        self.path = Path(path)
        if self.path.exists():
            if not (overwrite and is_bag(self.path)):
                raise RecordingError(f"{self.path} exists and is not overwritten; choose another name or remove it")
            shutil.rmtree(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._types = get_typestore(Stores.ROS2_JAZZY)
        self._writer = Writer(self.path, version=METADATA_VERSION, storage_plugin=StoragePlugin.MCAP)
        for key, value in (metadata or {}).items():
            self._writer.set_custom_data(key, value)
        self._writer.open()
        self._connections: dict[str, object] = {}
        self._queue: queue.Queue = queue.Queue(MAX_WAITING)
        self.written: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._drain, name="recording", daemon=True)
        self._thread.start()

    def knows(self, msgtype: str) -> bool:
        """Whether messages of this type can be written: their definition is part of the standard interfaces."""
        return msgtype in self._types.fielddefs

    def write(self, topic: str, msgtype: str, log_ns: int, data) -> None:
        """One message: serialized bytes, or a callable that gives them when it is called in the writing thread."""
        try:
            self._queue.put_nowait((topic, msgtype, log_ns, data))
        except queue.Full:
            self.dropped[topic] += 1

    def serialize(self, message, msgtype: str) -> bytes:
        """A rosbags message object -> CDR."""
        return bytes(self._types.serialize_cdr(message, msgtype))

    def compressed_image(self, stamp_ns: int, frame_id: str, format: str, data):
        """A CompressedImage as a rosbags object.

        Args:
            data: uint8 array.
        """
        types = self._types.types
        time = types["builtin_interfaces/msg/Time"](stamp_ns // NANOSECONDS, stamp_ns % NANOSECONDS)
        header = types["std_msgs/msg/Header"](stamp=time, frame_id=frame_id)
        return types["sensor_msgs/msg/CompressedImage"](header=header, format=format, data=data)

    def close(self) -> None:
        """Writes what is waiting, the index and the metadata."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _drain(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                topic, msgtype, log_ns, data = item
                if callable(data):
                    data = data()
                if data is None:
                    continue
                if topic not in self._connections:
                    self._connections[topic] = self._writer.add_connection(topic, msgtype, typestore=self._types)
                self._writer.write(self._connections[topic], log_ns, data)
                self.written[topic] += 1
        finally:
            self._writer.close()


def is_bag(path: Path) -> bool:
    """Whether a directory is a bag and nothing else: storage files, with metadata unless the recorder was killed."""
    names = {child.name for child in path.iterdir()} if path.is_dir() else set()
    return bool(names) and all(name == "metadata.yaml" or name.endswith((".mcap", ".db3")) for name in names)


def served(directory: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """(Cameras of an engine, what the bag's metadata tell of it): its manifest whole, or the name of a checkpoint.

    Raises:
        BundleError, CheckpointError: there is neither a valid bundle nor a valid checkpoint.
    """
    from vla_edge.engine.bundle import MANIFEST, Bundle

    if (Path(directory) / MANIFEST).is_file():
        spec = Bundle.load(directory).spec
        about = {"vla_edge.manifest": (Path(directory) / MANIFEST).read_text(encoding="utf-8")}
    else:
        from vla_edge.policy.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(directory)
        spec, about = checkpoint.spec, {"vla_edge.checkpoint": checkpoint.directory.name}
    return tuple(camera.name for camera in spec.cameras), about
