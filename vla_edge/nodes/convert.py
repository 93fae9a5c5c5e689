"""ROS messages <-> the nouns of vla_edge.types, and nothing else."""

from __future__ import annotations

import array
import functools
import struct
import sys
import time
from collections.abc import Callable

import numpy as np
from builtin_interfaces.msg import Duration, Time
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState as JointStateMessage
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_edge.clocks import offset_ns
from vla_edge.nodes.wire import WireImage
from vla_edge.observe.image import ImageError, decode_compressed, decode_image
from vla_edge.types import NANOSECONDS, ActionChunk, JointCommand, JointState, VlaEdgeError


class ChunkMessageError(VlaEdgeError):
    """A JointTrajectory that is no action chunk."""


def stamp_of(message) -> int:
    """ns of a stamped message."""
    stamp = message.header.stamp
    return stamp.sec * NANOSECONDS + stamp.nanosec


def to_time(stamp_ns: int) -> Time:
    """ns -> message."""
    return Time(sec=stamp_ns // NANOSECONDS, nanosec=stamp_ns % NANOSECONDS)


def arrival_of(info) -> int:
    """Steady-clock ns at which the middleware received a message.

    Args:
        info: the MessageInfo dictionary that rclpy gives a callback with two arguments.
    """
    now_ns, received_ns = time.monotonic_ns(), info.get("received_timestamp", 0)
    age_ns = now_ns + offset_ns() - received_ns if received_ns else 0
    # A wall clock that was set meanwhile must not put the arrival into the future or the far past.
    return now_ns - age_ns if 0 <= age_ns < NANOSECONDS else now_ns


@functools.lru_cache(maxsize=1)
def _cv_bridge():
    """cv_bridge where the distribution has it and its binary fits, else None."""
    try:
        from cv_bridge import CvBridge

        return CvBridge()
    except Exception:  # noqa: BLE001 - built against another numpy it fails in ways of its own
        return None


def image_decoder(message: Image) -> Callable[[], np.ndarray]:
    """Decodes a raw image when called: (H, W, 3) uint8 RGB, or ImageError."""
    bridge = _cv_bridge()
    if bridge is None:
        return lambda: decode_image(message.encoding, message.height, message.width, message.step, message.data)

    def decode() -> np.ndarray:
        try:
            return bridge.imgmsg_to_cv2(message, "rgb8")
        except Exception as error:  # noqa: BLE001 - CvBridgeError, or OpenCV's own
            raise ImageError(f"cv_bridge refuses the image: {error}") from None

    return decode


def decoder(image: WireImage, data: bytes, expected: tuple[int, int]) -> Callable[[], np.ndarray]:
    """Decodes a received image when called: (H, W, 3) uint8 RGB, or ImageError.

    Args:
        data: the serialized message that `image` was read from; cv_bridge wants it whole.
        expected: (height, width) of a compressed one.
    """
    if not image.height:
        return lambda: decode_compressed(image.data, expected, image.encoding)
    if _cv_bridge() is not None:
        return lambda: image_decoder(deserialize_message(data, Image))()
    return lambda: decode_image(image.encoding, image.height, image.width, image.step, image.data)


def to_image(stamp_ns: int, frame_id: str, pixels: np.ndarray) -> Image:
    """(H, W, 3) uint8 RGB -> message."""
    height, width = pixels.shape[:2]
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), frame_id
    # array.array is the one type that rclpy takes without looking at every byte.
    data = array.array("B")
    data.frombytes(np.ascontiguousarray(pixels).data)
    message.data = data
    return message


def to_jpeg(stamp_ns: int, frame_id: str, pixels: np.ndarray, quality: int = 90) -> CompressedImage:
    """(H, W, 3) uint8 RGB -> compressed message."""
    import cv2

    message = CompressedImage(format="jpeg")
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), frame_id
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    message.data = array.array("B", cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())
    return message


def to_command(message: JointStateMessage) -> JointCommand:
    """A joint command in its default form; velocity and effort are zero where they are left out.

    Raises:
        ValueError: lengths differ.
    """
    names = tuple(message.name)
    values = [np.array(getattr(message, key), np.float64) for key in ("position", "velocity", "effort")]
    values = [value if value.size or i == 0 else np.zeros(len(names)) for i, value in enumerate(values)]
    if any(value.shape != (len(names),) for value in values):
        raise ValueError(f"a joint command of {len(names)} names has {', '.join(str(v.size) for v in values)} values")
    return JointCommand(stamp_of(message), names, *values)


def to_joint_state(state: JointState) -> JointStateMessage:
    """Measured joints -> message."""
    message = JointStateMessage(name=list(state.names))
    message.header.stamp = to_time(state.stamp_ns)
    message.position, message.velocity, message.effort = map(doubles, (state.position, state.velocity, state.effort))
    return message


def doubles(values: np.ndarray) -> array.array:
    """float64 array -> what rclpy takes without a loop."""
    return array.array("d", np.ascontiguousarray(values, np.float64).tobytes())


def to_trajectory(chunk: ActionChunk) -> JointTrajectory:
    """Point i at `time_from_start = (i + 1) dt` from the observation's stamp."""
    message = JointTrajectory(joint_names=list(chunk.joint_names))
    message.header.stamp = to_time(chunk.stamp_ns)
    dt_ns = round(chunk.dt * NANOSECONDS)
    message.points = [
        JointTrajectoryPoint(
            positions=doubles(row),
            time_from_start=Duration(sec=at // NANOSECONDS, nanosec=at % NANOSECONDS),
        )
        for row, at in zip(chunk.positions, range(dt_ns, (len(chunk.positions) + 1) * dt_ns, dt_ns))
    ]
    return message


class ChunkWriter:
    """`to_trajectory`, serialized: only the stamp and the numbers of one prepared message change.

    rclpy takes half a millisecond to convert and serialize 32 points of 15 joints; this takes a twentieth of it.

    Args:
        joint_names: J joints of every chunk.
        points: T of every chunk.
        dt: s between them.
    """

    def __init__(self, joint_names: tuple[str, ...], points: int, dt: float):
        # A number for every place, none of them like another or like anything else in the message, shows where it lies.
        places = np.pi * np.arange(1.0, points * len(joint_names) + 1).reshape(points, len(joint_names))
        message = to_trajectory(ActionChunk(0, joint_names, places, dt))
        self._data = bytearray(serialize_message(message))
        starts = [self._data.index(row.tobytes()) for row in places]
        # The message ends with its last point's time; rclpy estimates the size and leaves rubbish behind that.
        last = message.points[-1].time_from_start
        end = struct.pack("<iI", last.sec, last.nanosec)
        del self._data[self._data.index(end, starts[-1] + places[-1].nbytes) + len(end) :]
        self._rows = [np.frombuffer(self._data, np.float64, len(joint_names), start) for start in starts]
        if sys.byteorder != "little" or not self._data[1] & 1:
            raise RuntimeError("the middleware does not serialize little-endian numbers; publish `to_trajectory` instead")

    def __call__(self, chunk: ActionChunk) -> bytes:
        """The serialized message for `chunk`."""
        # After the four bytes that tell the encoding, a message with a header begins with its stamp.
        struct.pack_into("<iI", self._data, 4, *divmod(chunk.stamp_ns, NANOSECONDS))
        for row, values in zip(self._rows, chunk.positions):
            row[:] = values
        return bytes(self._data)


def to_chunk(message: JointTrajectory) -> ActionChunk:
    """Inverse of `to_trajectory`.

    Raises:
        ChunkMessageError: no points, unequal lengths, or points that are not evenly spaced.
    """
    if not message.points:
        raise ChunkMessageError("the action chunk has no points; its publisher must send at least one")
    times = np.array([p.time_from_start.sec * NANOSECONDS + p.time_from_start.nanosec for p in message.points])
    dt_ns = int(times[0])
    if dt_ns <= 0 or np.abs(times - dt_ns * np.arange(1, len(times) + 1)).max() > 1000 * len(times):
        raise ChunkMessageError("the action chunk's points are not at (i + 1) dt; its publisher must space them evenly")
    lengths = {len(point.positions) for point in message.points}
    if lengths != {len(message.joint_names)}:
        raise ChunkMessageError(
            f"the action chunk names {len(message.joint_names)} joints and has points of {sorted(lengths)} positions; "
            "its publisher must send one each"
        )
    positions = np.array([point.positions for point in message.points])
    return ActionChunk(stamp_of(message), tuple(message.joint_names), positions, dt_ns / NANOSECONDS)
