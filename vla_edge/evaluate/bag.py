"""A recording as the policy would have seen it: observations on the clock of the camera, and what the robot then did.

One pass over the files, in the order they were recorded; only the frames that are used are decoded, and of videos those
that they build on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vla_edge.evaluate.contract import ENDINGS, TopicContract, find_topic
from vla_edge.evaluate.frame_stream import Frame, FrameStream
from vla_edge.evaluate.recording import Moment
from vla_edge.evaluate.storage import BagError, Storage
from vla_edge.evaluate.video_stream import COMPRESSED_VIDEO, FFMPEG_PACKET, VIDEO
from vla_edge.policy.spec import PolicySpec
from vla_edge.types import NANOSECONDS

__all__ = ["Bag", "BagError", "Frame"]

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
JOINT_STATE, STRING = "sensor_msgs/msg/JointState", "std_msgs/msg/String"
# What is read of each; the header's stamp is read where a header that comes first has it.
NEEDED = {
    IMAGE: ("header", "height", "width", "encoding", "step", "data"),
    COMPRESSED: ("header", "format", "data"),
    JOINT_STATE: ("header", "name", "position", "velocity", "effort"),
    STRING: ("data",),
    COMPRESSED_VIDEO: ("timestamp", "data", "format"),
    FFMPEG_PACKET: ("header", "encoding", "data"),
}
PICTURES = (IMAGE, COMPRESSED, *VIDEO)


class Bag:
    """One bag, opened for evaluation.

    Args:
        path: rosbag2 directory or single file.
        contract: which topic plays which part.

    Attributes:
        storage: the files underneath; `storage.warnings` tells what is damaged.
        skipped: reason -> number of frames and messages left out, of the newest pass over the bag.

    Raises:
        BagError: nothing can be read at `path`.
    """

    def __init__(self, path: str | Path, contract: TopicContract | None = None):
        self.storage = Storage(path)
        self.contract = contract or TopicContract()
        self.skipped: Counter[str] = Counter()

    @property
    def duration_s(self) -> float:
        """Seconds from the first message to the last."""
        return (self.storage.end_ns - self.storage.start_ns) / NANOSECONDS

    @property
    def start_ns(self) -> int:
        """Log time of the first message."""
        return self.storage.start_ns

    @property
    def span_s(self) -> float:
        """Seconds from `start_ns` to the last observation, about."""
        return self.duration_s

    @property
    def warnings(self) -> tuple[str, ...]:
        """What had to be repaired or left out, complete after a pass over the bag."""
        return tuple(self.storage.warnings)

    def cameras(self) -> tuple[str, ...]:
        """Cameras named by the contract, or else those recognizable by their topics."""
        if self.contract.cameras:
            return tuple(self.contract.cameras)
        names = set()
        for topic, msgtype in self.storage.topics.items():
            bare = topic.strip("/")
            for ending in ENDINGS:
                bare = bare.removesuffix(ending)
            parts = bare.split("/")
            if msgtype in PICTURES and len(parts) >= 2 and parts[-1] == "image":
                names.add(parts[-2])
        return tuple(sorted(names))

    def joint_names(self) -> tuple[str, ...]:
        """Joints of the bag's first usable joint state.

        Raises:
            BagError: there is none.
        """
        topic = self._require(self.contract.joint_states, JOINT_STATE, "the measured joints")
        for raw in self.storage.messages({topic}):
            names = self.storage.deserialize(raw).name
            if len(names):
                return tuple(self.contract.joints.get(name, name) for name in names)
        raise BagError(f"bag {self.storage.path} has no joint state on {topic}; record it again with the robot up")

    def frames(
        self,
        cameras: tuple[str, ...] | None = None,
        joint_names: tuple[str, ...] | None = None,
        rate_hz: float | None = None,
        horizon_s: float = 0.0,
        lags: Sequence[float] = (),
        instructed: bool = True,
    ) -> Iterator[Frame]:
        """Observations in order, each with the motion of the `horizon_s` after it.

        Args:
            cameras: the policy's cameras; the first one sets the pace. All of the bag's when None.
            joint_names: joints of the observation, in this order. All of the bag's when None.
            rate_hz: take at most this many frames per second of bag; every frame when None.
            lags: s before each observation at which it is to know those before it, oldest first.
            instructed: whether nothing is observed before the first instruction, and a bag has to have one.

        Raises:
            BagError: a topic is missing or of another type, or no message carries all the joints.
        """
        cameras = self.cameras() if cameras is None else tuple(cameras)
        topics = self._topics(cameras, instructed)
        names = tuple(joint_names) if joint_names is not None else self.joint_names()
        self.skipped.clear()
        aliases = self.contract.joints
        yield from FrameStream(
            self.storage, topics, cameras, names, aliases, rate_hz, horizon_s, self.skipped, lags, instructed
        ).frames()

    def moments(self, spec: PolicySpec) -> Iterator[Moment]:
        """See `Recording.moments`; a bag is read in one go, so they are decoded already."""
        cameras = tuple(camera.name for camera in spec.cameras)
        for frame in self.frames(cameras, spec.measured_names, lags=spec.lags, instructed=spec.reads_instruction):
            seen = frame.observation
            yield Moment(seen.stamp_ns, seen.instruction, lambda seen=seen: seen)

    def _topics(self, cameras: tuple[str, ...], instructed: bool) -> dict[str, tuple[str, str]]:
        """topic -> (part, camera): what every message of the bag is good for."""
        found: dict[str, tuple[str, str]] = {}
        missing: list[str] = []
        if not cameras:
            missing.append("a camera")
        for camera in cameras:
            candidates = [find_topic(name, self.storage.topics) for name in self.contract.camera_candidates(camera)]
            filled = [topic for topic in candidates if topic and self.storage.counts[topic]]
            if filled:
                self._check_type(filled[0], PICTURES)
                found[filled[0]] = ("camera", camera)
            else:
                missing.append(" or ".join(self.contract.camera_candidates(camera)))
        for part, name, msgtype in (
            ("joints", self.contract.joint_states, JOINT_STATE),
            ("instruction", self.contract.instruction, STRING),
        ):
            topic = find_topic(name, self.storage.topics)
            if topic and self.storage.counts[topic]:
                self._check_type(topic, (msgtype,))
                found[topic] = (part, "")
            elif part == "joints" or instructed:
                missing.append(name)
        if missing:
            raise BagError(self._lacks(missing))
        topic = find_topic(self.contract.joint_command, self.storage.topics)
        if topic and self.storage.topics[topic] == JOINT_STATE:
            found[topic] = ("command", "")
        return found

    def _require(self, name: str, msgtype: str, what: str) -> str:
        topic = find_topic(name, self.storage.topics)
        if not topic or not self.storage.counts[topic]:
            raise BagError(self._lacks([f"{name} ({what})"]))
        self._check_type(topic, (msgtype,))
        return topic

    def _check_type(self, topic: str, allowed: tuple[str, ...]) -> None:
        msgtype = self.storage.topics[topic]
        if msgtype not in allowed:
            raise BagError(
                f"bag {self.storage.path} has {msgtype} on {topic}, expected "
                f"{' or '.join(allowed)}; map the right topic in the topic contract"
            )
        fields = self.storage.fields(msgtype)
        if fields[:1] != NEEDED[msgtype][:1] or not set(NEEDED[msgtype]) <= set(fields):
            raise BagError(
                f"bag {self.storage.path} defines {msgtype} as {', '.join(fields) or 'nothing'}, which lacks or moves "
                f"one of {', '.join(NEEDED[msgtype])}; convert it to the standard message"
            )

    def _lacks(self, missing: list[str]) -> str:
        there = ", ".join(f"{topic} ({self.storage.counts[topic]})" for topic in sorted(self.storage.topics))
        return (
            f"bag {self.storage.path} lacks {', '.join(missing)}; it has {there or 'no messages at all'}; "
            "record these topics or map them in the topic contract"
        )

    def close(self) -> None:
        """Lets go of the files."""
        self.storage.close()

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_) -> None:
        self.close()
