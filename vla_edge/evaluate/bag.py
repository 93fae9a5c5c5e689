"""A recording as the policy would have seen it: observations on the clock of the camera, and what the robot then did.

One pass over the files, in the order they were recorded. Only the frames that are used are decoded, and only the
stretch of joint motion that a waiting frame still needs is held, so memory does not grow with the bag.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.evaluate.contract import TopicContract, find_topic
from vla_edge.evaluate.joint_reader import JointReader
from vla_edge.evaluate.pixels import ImageError, decode_image
from vla_edge.evaluate.storage import BagError, RawMessage, Storage
from vla_edge.evaluate.trajectory import JointTrajectory, JointWindow
from vla_edge.types import NANOSECONDS, Observation

__all__ = ["Bag", "BagError", "Frame", "observations"]

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
JOINT_STATE, STRING = "sensor_msgs/msg/JointState", "std_msgs/msg/String"

# A joint state older than this at the moment of a frame says too little about that moment.
MAX_JOINT_AGE_S = 0.2
# Frames of further cameras may be this much older than the first camera's.
MAX_CAMERA_SKEW_S = 0.2
# How long after a frame was recorded its joint states may still arrive.
MAX_ARRIVAL_S = 0.5
# Stamps that fall back further than this mean that the clock was set, not that messages overtook each other.
CLOCK_RESET_S = 1.0


@dataclass(frozen=True)
class Frame:
    """One observation of the bag and the motion that followed it.

    Attributes:
        observation: what the policy would have been shown; its joints are the newest not newer than its stamp.
        measured: joint positions from the observation to the horizon asked for.
        commanded: what the joints were told meanwhile, None when the bag does not say.
    """

    observation: Observation
    measured: JointTrajectory
    commanded: JointTrajectory | None


@dataclass
class _Pending:
    """A chosen frame, still serialized, waiting for the joint states around and after it."""

    stamp_ns: int
    log_ns: int
    images: dict[str, RawMessage]
    instruction: str
    until_ns: int | None = None


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

    def cameras(self) -> tuple[str, ...]:
        """Cameras named by the contract, or else those recognizable by their topics."""
        if self.contract.cameras:
            return tuple(self.contract.cameras)
        names = set()
        for topic, msgtype in self.storage.topics.items():
            parts = topic.strip("/").removesuffix("/compressed").split("/")
            if msgtype in (IMAGE, COMPRESSED) and len(parts) >= 2 and parts[-1] == "image":
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
    ) -> Iterator[Frame]:
        """Observations in order, each with the motion of the `horizon_s` after it.

        Args:
            cameras: the policy's cameras; the first one sets the pace. All of the bag's when None.
            joint_names: joints of the observation, in this order. All of the bag's when None.
            rate_hz: take at most this many frames per second of bag; every frame when None.

        Raises:
            BagError: a topic is missing or of another type, or no message carries all the joints.
        """
        cameras = self.cameras() if cameras is None else tuple(cameras)
        topics = self._topics(cameras)
        names = tuple(joint_names) if joint_names is not None else self.joint_names()
        return _Pass(self, cameras, topics, names, rate_hz, horizon_s).frames()

    def _topics(self, cameras: tuple[str, ...]) -> dict[str, tuple[str, str]]:
        """topic -> (part, camera): what every message of the bag is good for."""
        found: dict[str, tuple[str, str]] = {}
        missing: list[str] = []
        if not cameras:
            missing.append("a camera")
        for camera in cameras:
            candidates = [find_topic(name, self.storage.topics) for name in self.contract.camera_candidates(camera)]
            filled = [topic for topic in candidates if topic and self.storage.counts[topic]]
            if filled:
                self._check_type(filled[0], (IMAGE, COMPRESSED))
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
            else:
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
        if self.storage.topics[topic] not in allowed:
            raise BagError(
                f"bag {self.storage.path} has {self.storage.topics[topic]} on {topic}, expected "
                f"{' or '.join(allowed)}; map the right topic in the topic contract"
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


class _Pass:
    """One run through a bag, and everything it has to remember meanwhile."""

    def __init__(self, bag: Bag, cameras, topics, names: tuple[str, ...], rate_hz: float | None, horizon_s: float):
        self._bag, self._storage = bag, bag.storage
        self._cameras, self._topics, self._names = cameras, topics, names
        self._period_ns = NANOSECONDS / rate_hz if rate_hz else 0.0
        self._horizon_ns = round(horizon_s * NANOSECONDS)
        self._measured = JointWindow(names)
        self._measured_reader = JointReader(self._storage, names, bag.contract.joints)
        self._commanded = JointWindow(names) if any(part == "command" for part, _ in topics.values()) else None
        self._commanded_reader = JointReader(self._storage, names, bag.contract.joints)
        self._others: dict[str, deque[tuple[int, RawMessage]]] = {camera: deque(maxlen=64) for camera in cameras[1:]}
        self._instruction: str | None = None
        self._pending: deque[_Pending] = deque()
        self._origin_ns: int | None = None
        self._slot = -1
        self._newest_ns: int | None = None

    def frames(self) -> Iterator[Frame]:
        self._bag.skipped.clear()
        seen = 0
        for raw in self._storage.messages(set(self._topics)):
            part, camera = self._topics[raw.topic]
            try:
                if part == "joints":
                    self._add_joints(raw, "joint state", self._measured, self._measured_reader)
                elif part == "command":
                    self._add_joints(raw, "joint command", self._commanded, self._commanded_reader)
                elif part == "instruction":
                    self._add_instruction(raw)
                elif camera == self._cameras[0]:
                    yield from self._add_frame(raw)
                else:
                    self._others[camera].append((self._storage.header_stamp(raw), raw))
            except BagError:
                self._bag.skipped[f"{raw.msgtype} that does not decode"] += 1
            for frame in self._ready(raw.log_ns):
                seen += 1
                yield frame
        for frame in self._ready(None):
            seen += 1
            yield frame
        lacking = self._measured_reader.lacking
        if not seen and lacking:
            raise BagError(
                f"bag {self._storage.path} never reports {', '.join(lacking[:4])}"
                f"{' and more' if len(lacking) > 4 else ''}, which the policy needs; map the joints in the topic "
                "contract or use an engine built for this robot"
            )

    def _add_instruction(self, raw: RawMessage) -> None:
        self._instruction = str(self._storage.deserialize(raw).data)
        for pending in self._pending:
            if pending.until_ns is None:
                pending.until_ns = raw.log_ns

    def _add_joints(self, raw: RawMessage, kind: str, window: JointWindow, reader: JointReader) -> None:
        skipped = self._bag.skipped
        stamp = self._storage.header_stamp(raw)
        if window.newest_ns is not None and stamp < window.newest_ns - CLOCK_RESET_S * NANOSECONDS:
            window.clear()
            skipped[f"{kind} after the clock was set back"] += 1
        positions = reader.positions(raw)
        if positions is None:
            skipped[f"{kind} without all joints"] += 1
        elif not np.isfinite(positions).all():
            skipped[f"{kind} without finite positions"] += 1
        elif not window.add(stamp, positions, raw):
            skipped[f"{kind} with a stamp not newer than the last"] += 1

    def _add_frame(self, raw: RawMessage) -> Iterator[Frame]:
        stamp = self._storage.header_stamp(raw)
        if self._newest_ns is not None and stamp <= self._newest_ns:
            if stamp > self._newest_ns - CLOCK_RESET_S * NANOSECONDS:
                self._bag.skipped["frame with a stamp not newer than the last"] += 1
                return
            yield from self._ready(None)
            self._origin_ns, self._slot = None, -1
        gap_ns = stamp - self._newest_ns if self._origin_ns is not None else 0
        self._newest_ns = stamp
        if not self._is_due(stamp, gap_ns):
            return
        if self._instruction is None:
            self._bag.skipped["frame before the first instruction"] += 1
            return
        images = {self._cameras[0]: raw}
        for camera, recent in self._others.items():
            match = [one for at, one in recent if stamp - MAX_CAMERA_SKEW_S * NANOSECONDS <= at <= stamp]
            if not match:
                self._bag.skipped[f"frame without one of camera {camera} near it"] += 1
                return
            images[camera] = match[-1]
        self._pending.append(_Pending(stamp, raw.log_ns, images, self._instruction))

    def _is_due(self, stamp: int, gap_ns: float) -> bool:
        """Whether this frame is the nearest to a tick of the rate; jitter up to a quarter period loses none."""
        if self._origin_ns is None:
            self._origin_ns = stamp
        if not self._period_ns:
            return True
        early = max(min(self._period_ns / 4, gap_ns / 2 - 1), 0)
        slot = int((stamp - self._origin_ns + early) // self._period_ns)
        due = slot > self._slot
        self._slot = max(slot, self._slot)
        return due

    def _ready(self, log_ns: int | None) -> Iterator[Frame]:
        """The frames whose joint states are all here, or can no longer come; everything left when `log_ns` is None."""
        while self._pending:
            first = self._pending[0]
            end_ns = first.stamp_ns + self._horizon_ns
            newest = self._measured.newest_ns
            complete = newest is not None and newest >= end_ns
            late = log_ns is None or log_ns > first.log_ns + self._horizon_ns + MAX_ARRIVAL_S * NANOSECONDS
            if not (complete or late):
                break
            self._pending.popleft()
            frame = self._finish(first, end_ns)
            if frame is not None:
                yield frame
        oldest = self._pending[0].stamp_ns if self._pending else self._newest_ns
        if oldest is not None:
            for window in filter(None, (self._measured, self._commanded)):
                window.forget_before(oldest - round(MAX_JOINT_AGE_S * NANOSECONDS))

    def _finish(self, pending: _Pending, end_ns: int) -> Frame | None:
        newest = self._measured.as_of(pending.stamp_ns)
        if newest is None or pending.stamp_ns - newest[0] > MAX_JOINT_AGE_S * NANOSECONDS:
            self._bag.skipped[f"frame without a joint state of the {MAX_JOINT_AGE_S:g} s before it"] += 1
            return None
        images: dict[str, np.ndarray] = {}
        for camera, raw in pending.images.items():
            try:
                images[camera] = decode_image(self._storage.deserialize(raw))
            except ImageError as error:
                self._bag.skipped[f"frame of camera {camera}: {error}"] += 1
                return None
            except BagError:
                self._bag.skipped[f"frame of camera {camera} that does not decode"] += 1
                return None
        joints = self._measured_reader.state(newest[1], newest[0])
        observation = Observation(pending.stamp_ns, images, joints, pending.instruction)
        measured, commanded = (
            window and window.between(pending.stamp_ns, end_ns, pending.until_ns)
            for window in (self._measured, self._commanded)
        )
        return Frame(observation, measured, commanded)


def observations(
    path: str | Path,
    spec=None,
    rate_hz: float | None = None,
    contract: TopicContract | None = None,
) -> Iterator[Observation]:
    """The observations of a bag as the policy of `spec` would have been shown them; all cameras and joints without one.

    Raises:
        BagError: the bag cannot be read or lacks what the policy needs.
    """
    with Bag(path, contract) as bag:
        cameras = tuple(camera.name for camera in spec.cameras) if spec is not None else None
        for frame in bag.frames(cameras, spec.joint_names if spec is not None else None, rate_hz):
            yield frame.observation
