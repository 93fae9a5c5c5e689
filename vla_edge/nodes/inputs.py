"""The subscriptions of a policy: what arrives is checked, counted when it is refused, and handed to the aligner."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from vla_edge.nodes import convert, qos
from vla_edge.nodes.stream import Stream, StreamThread
from vla_edge.nodes.wire import JointStates, read_image
from vla_edge.observe.align import Aligner, Frame
from vla_edge.observe.image import check_image
from vla_edge.observe.joints import JointStateReader
from vla_edge.policy.spec import CameraSpec, PolicySpec
from vla_edge.types import VlaEdgeError


class ObservationInputs:
    """Feeds an aligner from topics.

    Args:
        node: subscribes.
        spec: cameras and joints of the policy.
        aligner: takes what is good.
        check_instruction: raises VlaEdgeError on an instruction the policy cannot be given.
        on_frame: called with the arrival (steady clock, ns) of each good frame of the first camera.
        raw: subscribe to raw images, otherwise to compressed ones.
        priority: of the threads that take joint states and images in, see `control.realtime.prioritize`.
        fingerprints: tell the aligner by their pixels which frames show the same.

    Attributes:
        rejected: source -> messages refused.
        received: source -> messages, good and bad.
        last_problem: newest reason, for the diagnostics.
    """

    def __init__(
        self,
        node,
        spec: PolicySpec,
        aligner: Aligner,
        check_instruction: Callable[[str], object],
        on_frame: Callable[[int], None],
        raw: bool,
        priority: int = 0,
        fingerprints: bool = False,
    ):
        self._node, self._aligner, self._on_frame = node, aligner, on_frame
        self._fingerprints = fingerprints
        self._check_instruction = check_instruction
        self._parse_joints = JointStates()
        self._read_joints = JointStateReader(spec.joint_names)
        self.rejected: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.last_problem = ""
        # Joints are looked up at the stamp of a frame, which takes longer to arrive: a few at a time are soon enough.
        self._joints = Stream(node, JointState, "joint_states", self._on_joints, qos.STREAM, raw=True)
        self._streams = [StreamThread([self._joints], 0.01, "joint_states", priority)]
        self._subscriptions = [
            node.create_subscription(String, "instruction", self._on_instruction, qos.LATCHED),
        ]
        for camera in spec.cameras:
            callback = self._image_callback(camera, pacing=camera is spec.cameras[0], raw=raw)
            topic = f"{camera.name}/image" + ("" if raw else "/compressed")
            kind = Image if raw else CompressedImage
            self._streams.append(StreamThread([Stream(node, kind, topic, callback, qos.SENSOR, raw=True)], 0.0, topic, priority))

    def destroy(self) -> None:
        """Ends the subscriptions."""
        for stream in reversed(self._streams):  # cameras first: they take joints
            stream.close()
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)

    def _image_callback(self, camera: CameraSpec, pacing: bool, raw: bool):
        expected, source = (camera.source_height, camera.source_width), f"camera {camera.name}"

        def on_image(data: bytes, info):
            self.received[source] += 1
            try:
                image = read_image(data, compressed=not raw)
                if raw:
                    check_image(image.encoding, image.height, image.width, image.step, len(image.data), expected)
                decode = convert.decoder(image, data, expected)
            except VlaEdgeError as error:
                self._reject(source, error)
                return
            arrival_ns = convert.arrival_of(info)
            # Every eleventh byte tells pictures apart: a prime, so that no column of pixels is left out for good.
            print_ = zlib.crc32(np.frombuffer(image.data, np.uint8)[::11].tobytes()) if self._fingerprints else None
            newest = self._aligner.add_frame(camera.name, Frame(image.stamp_ns, arrival_ns, decode, print_, not raw))
            if pacing and newest:
                # Those of its moment are here, but after a stall of this process nobody may have taken them yet.
                self._joints.drain()
                self._on_frame(arrival_ns)

        return on_image

    def _on_joints(self, data: bytes, info) -> None:
        self.received["joint states"] += 1
        try:
            joints = self._read_joints(*self._parse_joints(data))
        except VlaEdgeError as error:
            self._reject("joint states", error)
            return
        self._aligner.add_joints(joints, convert.arrival_of(info))

    def _on_instruction(self, message: String) -> None:
        self.received["instruction"] += 1
        try:
            self._check_instruction(message.data)
        except VlaEdgeError as error:
            # What the robot was asked cannot be known, and may have been to stop: it gets no further chunks and holds.
            self._aligner.set_instruction(None)
            self._reject("instruction", error, quiet=not message.data.strip())
            return
        self._aligner.set_instruction(message.data)

    def _reject(self, source: str, error: VlaEdgeError, quiet: bool = False) -> None:
        self.rejected[source] += 1
        self.last_problem = str(error)
        if quiet:  # an empty instruction is how one is withdrawn: counted, but no alarm
            return
        # A broken camera complains at its own rate; once in five seconds is enough to read.
        self._node.get_logger().warning(f"{source} rejected: {error}", throttle_duration_sec=5.0)
