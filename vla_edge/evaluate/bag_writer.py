"""Writes rosbag2 bags without ROS: calibration data, test bags, whatever a script has to hand to a robot's tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from vla_edge.evaluate.bag import COMPRESSED, IMAGE, JOINT_STATE, STRING
from vla_edge.evaluate.contract import TopicContract
from vla_edge.evaluate.storage import BagError
from vla_edge.types import NANOSECONDS, JointCommand, JointState

# Version 8 of the metadata is the newest that Iron and Jazzy, and every later distribution, all read.
METADATA_VERSION = 8


class BagWriter:
    """Writes one rosbag2 directory; use it as a context manager, so that the index is written whatever happens.

    Messages are logged at their own stamp. Write them in time order: readers of a bag expect that.

    Args:
        path: directory to create.
        contract: topic names; cameras go to `<camera>/image`, or `<camera>/image/compressed`, unless mapped.
        storage: "mcap" or "sqlite3".
        image_format: "raw", "png" (lossless) or "jpeg".
        jpeg_quality: 1 to 100.
        compression: of zstd, on each "message", on the "file", or in MCAP on "chunk"s of messages; None for none.
        metadata: text kept in the bag's metadata, for example where it comes from.

    Raises:
        BagError: something is at `path` already.
    """

    def __init__(
        self,
        path: str | Path,
        contract: TopicContract | None = None,
        storage: str = "mcap",
        image_format: str = "raw",
        jpeg_quality: int = 95,
        compression: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore

        if image_format not in ("raw", "png", "jpeg"):
            raise ValueError(f"image_format is {image_format!r}; it must be raw, png or jpeg")
        self.path = Path(path)
        if self.path.exists():
            raise BagError(f"{self.path} is there already and a bag is never overwritten; choose another name")
        self._contract = contract or TopicContract()
        self._image_format, self._jpeg_quality = image_format, jpeg_quality
        self._types = get_typestore(Stores.ROS2_JAZZY)
        self._writer = Writer(self.path, version=METADATA_VERSION, storage_plugin=StoragePlugin[storage.upper()])
        if compression is not None:
            mode = CompressionMode["STORAGE" if compression == "chunk" else compression.upper()]
            self._writer.set_compression(mode, CompressionFormat.ZSTD)
        for key, value in (metadata or {}).items():
            self._writer.set_custom_data(key, value)
        self._writer.open()
        self._connections: dict[str, object] = {}

    def image(self, stamp_ns: int, camera: str, pixels: np.ndarray, frame_id: str = "") -> None:
        """One frame, (H, W, 3) uint8 RGB."""
        compressed = self._image_format != "raw"
        topic = self._contract.cameras.get(camera, f"{camera}/image" + ("/compressed" if compressed else ""))
        header = self._header(stamp_ns, frame_id or f"{camera}_camera")
        if compressed:
            data = np.frombuffer(self._encode(pixels), np.uint8)
            message = self._types.types[COMPRESSED](header=header, format=self._image_format, data=data)
            self._write(topic, COMPRESSED, stamp_ns, message)
        else:
            height, width = pixels.shape[:2]
            data = np.ascontiguousarray(pixels).reshape(-1)
            message = self._types.types[IMAGE](header, height, width, "rgb8", 0, width * 3, data)
            self._write(topic, IMAGE, stamp_ns, message)

    def joints(self, state: JointState) -> None:
        """Measured joints."""
        self._joint_message(self._contract.joint_states, state)

    def command(self, command: JointCommand) -> None:
        """What the joints were told."""
        self._joint_message(self._contract.joint_command, command)

    def instruction(self, stamp_ns: int, text: str) -> None:
        """What the policy is asked to do from now on."""
        self._write(self._contract.instruction, STRING, stamp_ns, self._types.types[STRING](data=text))

    def message(self, topic: str, msgtype: str, log_ns: int, message) -> None:
        """Any other message of the standard interfaces, as a rosbags object."""
        self._write(topic, msgtype, log_ns, message)

    def _joint_message(self, topic: str, state: JointState | JointCommand) -> None:
        values = [np.asarray(getattr(state, name), np.float64) for name in ("position", "velocity", "effort")]
        message = self._types.types[JOINT_STATE](self._header(state.stamp_ns, ""), list(state.names), *values)
        self._write(topic, JOINT_STATE, state.stamp_ns, message)

    def _header(self, stamp_ns: int, frame_id: str):
        time = self._types.types["builtin_interfaces/msg/Time"](
            sec=stamp_ns // NANOSECONDS, nanosec=stamp_ns % NANOSECONDS
        )
        return self._types.types["std_msgs/msg/Header"](stamp=time, frame_id=frame_id)

    def _write(self, topic: str, msgtype: str, log_ns: int, message) -> None:
        topic = "/" + topic.lstrip("/")
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, msgtype, typestore=self._types)
        self._writer.write(self._connections[topic], log_ns, self._types.serialize_cdr(message, msgtype))

    def _encode(self, pixels: np.ndarray) -> bytes:
        import cv2

        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        if self._image_format == "png":
            _, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 9])
        else:
            _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, self._jpeg_quality])
        return data.tobytes()

    def close(self) -> None:
        """Writes the index and the metadata."""
        self._writer.close()

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def write_bag(path: str | Path, items: Iterable[tuple], **options) -> Path:
    """Writes a bag from items in time order: ("image", stamp_ns, camera, pixels), ("joints", JointState),
    ("command", JointCommand), ("instruction", stamp_ns, text). `options` are those of `BagWriter`.

    Raises:
        BagError: something is at `path` already.
    """
    with BagWriter(path, **options) as writer:
        for kind, *arguments in items:
            {
                "image": writer.image,
                "joints": writer.joints,
                "command": writer.command,
                "instruction": writer.instruction,
            }[kind](*arguments)
    return Path(path)
