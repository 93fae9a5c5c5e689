"""A recording as long as one likes: two 640x480 cameras at 30 Hz in JPEG, joints at 100 Hz, pictures of the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_edge.evaluate.bag import COMPRESSED, Bag
from vla_edge.evaluate.bag_writer import BagWriter
from vla_edge.types import NANOSECONDS, JointState

CAMERA_HZ, JOINT_HZ = 30, 100
CAMERAS = ("head", "wrist")
START_NS = 1_700_000_000_000_000_000
JPEG_QUALITY = 80


def write_long_bag(path: Path, seconds: float, pictures_from: Path) -> Path:
    """Writes one: the first episode of the recording `pictures_from`, there and back again, over and over."""
    import cv2

    episode = first_episode(pictures_from)
    jpegs = []
    for seen in episode:
        bgr = cv2.cvtColor(next(iter(seen.images.values())), cv2.COLOR_RGB2BGR)
        jpegs.append(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].ravel())
    names, postures = episode[0].joints.names, np.array([seen.joints.position for seen in episode])
    times = np.array([seen.stamp_ns - episode[0].stamp_ns for seen in episode]) / NANOSECONDS
    with BagWriter(path, image_format="jpeg") as writer:
        writer.instruction(START_NS, episode[0].instruction)
        image, header = writer._types.types[COMPRESSED], writer._header
        for k in range(round(seconds * JOINT_HZ)):
            stamp = START_NS + k * NANOSECONDS // JOINT_HZ
            at = times[-1] - abs(k / JOINT_HZ % (2 * times[-1]) - times[-1])
            posture = np.array([np.interp(at, times, column) for column in postures.T])
            writer.joints(JointState(stamp, names, posture))
            # 30 Hz on a grid of 100: every third or fourth
            if k == 0 or k * CAMERA_HZ // JOINT_HZ != (k - 1) * CAMERA_HZ // JOINT_HZ:
                shown = int(np.abs(times - at).argmin())
                for offset, camera in enumerate(CAMERAS):
                    message = image(header(stamp, camera), "jpeg", jpegs[shown - offset])
                    writer.message(f"{camera}/image/compressed", COMPRESSED, stamp, message)
    return path


def with_camera_delay(recording: Path, path: Path, seconds: float, delay_ns: int = 100_000_000) -> Path:
    """The first `seconds` of a recording, its pictures received `delay_ns` after they were taken, as live ones are."""
    with Bag(recording) as bag, BagWriter(path) as writer:
        storage, connections = bag.storage, {}
        end_ns = storage.start_ns + round(seconds * NANOSECONDS)
        messages = []
        for raw in storage.messages(set(storage.topics)):
            late = delay_ns if raw.msgtype == COMPRESSED else 0
            if raw.log_ns < end_ns:
                messages.append((raw.log_ns + late, raw.topic, raw.msgtype, raw.data))
        for log_ns, topic, msgtype, data in sorted(messages, key=lambda message: message[0]):
            if topic not in connections:
                connections[topic] = writer._writer.add_connection(topic, msgtype, typestore=writer._types)
            writer._writer.write(connections[topic], log_ns, data)
    return path


def first_episode(recording: Path) -> list:
    """Observations up to the first pause."""
    found: list = []
    with Bag(recording) as bag:
        for frame in bag.frames():
            if found and frame.observation.stamp_ns - found[-1].stamp_ns > NANOSECONDS:
                break
            found.append(frame.observation)
    return found
