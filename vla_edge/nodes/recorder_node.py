"""Records topics to an MCAP bag; raw images are kept as JPEG, so that a minute of camera is megabytes, not gigabytes."""

from __future__ import annotations

import importlib
import time

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from std_srvs.srv import Trigger

from vla_edge.nodes import convert
from vla_edge.nodes.params import Parameter, ParameterError, Parameters
from vla_edge.nodes.recording import Recording, served
from vla_edge.nodes.run import nice, run_node
from vla_edge.nodes.stream import Stream, StreamThread
from vla_edge.observe.image import ImageError

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
TOPICS = ["head/image", "head/image/compressed", "joint_states", "instruction", "action_chunk", "joint_command",
          "emergency_stop", "speed_scale", "operator_command", "intervention", "/diagnostics"]
# s between looks at a topic; its queue holds what comes meanwhile.
REST = 0.02
PARAMETERS = (
    Parameter("output", "", "directory of the bag to write"),
    Parameter("overwrite", False, "replace a bag that is there"),
    Parameter("topics", TOPICS, "what to record; topics that appear later are taken up then"),
    Parameter("bundle", "", "engine that is served: its cameras are recorded too, its manifest goes into the metadata"),
    Parameter("jpeg_quality", 90, "of raw images, which are kept at <topic>/compressed; 0 keeps them raw", 0, 100),
    Parameter("image_rate", 0.0, "most frames of a raw image topic kept per second; 0 keeps all", 0.0, 1000.0),
    Parameter("nice", 5, "steps back behind the control loop when the processor is short", 0, 19),
)


class RecorderNode(Node):
    """See the file's first line."""

    def __init__(self):
        super().__init__("recorder")
        values = Parameters(self, PARAMETERS).read()
        if not values.output:
            raise ParameterError("parameter output is '', allowed is the name of a directory that does not exist yet")
        nice(values.nice)
        self._values = values
        cameras, about = served(values.bundle) if values.bundle else ((), {})
        self._recording = Recording(values.output, values.overwrite, about)
        seen = [f"{camera}/image{form}" for camera in cameras for form in ("", "/compressed")]
        self._wanted = {self.resolve_topic_name(topic) for topic in (*values.topics, *seen)}
        self._inputs: list = []
        self._due: dict[str, int] = {}
        self._timer = self.create_timer(0.2, self._take_up)
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.get_logger().info(f"recording to {values.output}")

    def _take_up(self) -> None:
        """Subscribes to those of the wanted topics that have a publisher by now, with the quality it offers."""
        # The longer name first: what is compressed already need not be compressed again.
        for topic in sorted(self._wanted, reverse=True):
            if topic not in self._wanted:
                continue
            offers = self.get_publishers_info_by_topic(topic)
            if not offers:
                continue
            self._wanted.remove(topic)
            msgtype = offers[0].topic_type
            if not self._recording.knows(msgtype):
                self.get_logger().error(f"{topic} is a {msgtype}, whose definition is not known; it is not recorded")
                continue
            reliable = all(offer.qos_profile.reliability == ReliabilityPolicy.RELIABLE for offer in offers)
            latched = all(offer.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers)
            profile = QoSProfile(
                history=HistoryPolicy.KEEP_LAST,
                depth=4 if msgtype == IMAGE else 100,
                reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
                durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
            )
            # A camera that offers both forms is recorded once: both would go to the same topic of the bag.
            self._wanted -= {f"{topic}/compressed", topic.removesuffix("/compressed")}
            jpeg = msgtype == IMAGE and self._values.jpeg_quality > 0
            callback = self._image_callback(topic) if jpeg else self._raw_callback(topic, msgtype)
            self._inputs.append(StreamThread([Stream(self, message_class(msgtype), topic, callback, profile, raw=True)], REST))

    def _raw_callback(self, topic: str, msgtype: str):
        return lambda data, info: self._recording.write(topic, msgtype, received(info), data)

    def _image_callback(self, topic: str):
        cls, out = message_class(IMAGE), f"{topic}/compressed"
        period_ns = int(1e9 / self._values.image_rate) if self._values.image_rate else 0

        def on_image(data: bytes, info) -> None:
            now_ns = received(info)
            # A quarter period early is in time: frames of 30 Hz thinned to 10 jitter around every third.
            if period_ns and now_ns < self._due.get(topic, 0) - period_ns // 4:
                return
            self._due[topic] = max(self._due.get(topic, now_ns) + period_ns, now_ns)
            self._recording.write(out, COMPRESSED, now_ns, lambda: self._jpeg(deserialize_message(data, cls)))

        return on_image

    def _jpeg(self, message) -> bytes | None:
        import cv2

        try:
            pixels = cv2.cvtColor(convert.image_decoder(message)(), cv2.COLOR_RGB2BGR)
        except ImageError as error:
            self.get_logger().warning(f"image not recorded: {error}", throttle_duration_sec=5.0)
            return None
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, self._values.jpeg_quality])
        image = self._recording.compressed_image(convert.stamp_of(message), message.header.frame_id, "jpeg", data.ravel())
        return self._recording.serialize(image, COMPRESSED)

    def _on_stop(self, request, response):
        self.close()
        response.success, response.message = True, self._summary()
        return response

    def close(self) -> None:
        """Ends the recording; the bag is complete afterwards."""
        for stream in self._inputs:
            stream.close()
        if self._inputs or not self._timer.is_canceled():
            self._inputs = []
            self._timer.cancel()
            self._recording.close()
            self.get_logger().info(self._summary())

    def _summary(self) -> str:
        recording = self._recording
        dropped = f", {recording.dropped.total()} dropped" if recording.dropped else ""
        return f"{recording.written.total()} messages of {len(recording.written)} topics in {recording.path}{dropped}"


def received(info: dict) -> int:
    """ns at which the middleware received a message."""
    return info.get("received_timestamp") or time.time_ns()


def message_class(msgtype: str) -> type:
    """The Python class of "package/msg/Name"."""
    package, _, name = msgtype.split("/")
    return getattr(importlib.import_module(f"{package}.msg"), name)


def main(args=None) -> None:
    """Runs the node."""
    run_node(RecorderNode, args)
