"""Cameras and joints for benchmarks: fixed pictures, joints that go where they are told, an instruction.

    python benchmarks/robot_source.py joints --instruction "touch the red cube with your left hand"
    python benchmarks/robot_source.py cameras --names head

Two processes, as drivers are. As cheap as a driver in C++: messages are serialized once, and only their stamps change.
"""

from __future__ import annotations

import argparse
import struct
import time
from collections.abc import Callable

import cv2
import numpy as np
import rclpy
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from vla_edge.control.loop import DeadlineLoop
from vla_edge.control.realtime import prioritize
from vla_edge.nodes import convert, middleware, qos
from vla_edge.nodes.stream import Stream
from vla_edge.sim.world import HOME, TabletopWorld
from vla_edge.types import NANOSECONDS

JPEG_QUALITY = 90


def main(options: argparse.Namespace) -> None:
    """Publishes until interrupted."""
    middleware.prepare(images=options.part == "cameras")
    rclpy.init()
    node = rclpy.create_node(f"robot_{options.part}", start_parameter_services=False)
    prioritize(20)
    tick = joint_tick(node, options.instruction) if options.part == "joints" else camera_tick(node, options)
    try:
        DeadlineLoop(round(1e9 / options.rate), tick).run()
    except KeyboardInterrupt:
        pass


def camera_tick(node, options: argparse.Namespace) -> Callable[[int], None]:
    """Publishes a picture of every camera."""
    cameras = [Camera(node, name, options.compressed) for name in options.names]

    def tick(deadline_ns: int) -> None:
        for camera in cameras:
            camera.publish()

    return tick


def joint_tick(node, instruction: str) -> Callable[[int], None]:
    """Publishes joints that follow commands; and, once, an instruction."""
    joints = node.create_publisher(JointState, "joint_states", qos.SENSOR_OUT)
    words = node.create_publisher(String, "instruction", qos.LATCHED)
    words.publish(String(data=instruction))
    state = JointState(name=list(TabletopWorld.joint_names), position=convert.doubles(HOME))
    position = np.frombuffer(state.position)

    def follow(message: JointState, info) -> None:
        position[:] = message.position

    commands = Stream(node, JointState, "joint_command", follow, qos.SENSOR)

    def tick(deadline_ns: int) -> None:
        commands.drain()
        state.header.stamp = convert.to_time(time.time_ns())
        joints.publish(state)

    return tick


class Camera:
    """One picture under new stamps, raw or as JPEG."""

    def __init__(self, node, name: str, compressed: bool):
        pixels = picture()
        if compressed:
            kind, topic = CompressedImage, f"{name}/image/compressed"
            jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
            message = CompressedImage(format="rgb8; jpeg compressed bgr8", data=jpeg.tobytes())
        else:
            kind, topic = Image, f"{name}/image"
            message = convert.to_image(0, name, pixels)
        self._data = bytearray(serialize_message(message))
        self._publisher = node.create_publisher(kind, topic, qos.SENSOR_OUT)

    def publish(self) -> None:
        # After the four bytes that tell the encoding, a message with a header begins with its stamp.
        struct.pack_into("<iI", self._data, 4, *divmod(time.time_ns(), NANOSECONDS))
        self._publisher.publish(bytes(self._data))


def picture(height: int = 480, width: int = 640) -> np.ndarray:
    """(height, width, 3) uint8 with detail at every scale, as photographs have: ever finer noise, ever weaker."""
    rng, pixels = np.random.default_rng(0), np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128, 256):
        coarse = rng.normal(size=(cells * height // width + 1, cells, 3)) / cells
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels += rng.normal(size=pixels.shape) / width
    return np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    joints = parts.add_parser("joints")
    joints.add_argument("--rate", type=float, default=250.0, help="Hz")
    joints.add_argument("--instruction", required=True)
    cameras = parts.add_parser("cameras")
    cameras.add_argument("--rate", type=float, default=30.0, help="Hz")
    cameras.add_argument("--names", nargs="+", default=["head"])
    cameras.add_argument("--compressed", action="store_true")
    return parser


if __name__ == "__main__":
    main(_parser().parse_args())
