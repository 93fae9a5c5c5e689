"""Aligns the messages of a bag: camera frames on a chosen rate, each with the joints at it and the motion after it.

A frame waits, still serialized, until everything that belongs to it has been recorded or can no longer come. So what
is held is a few frames and the stretch of joint motion behind them, however long the bag.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_edge.evaluate.joint_reader import JointReader
from vla_edge.evaluate.storage import BagError, RawMessage, Storage
from vla_edge.evaluate.trajectory import JointTrajectory, JointWindow
from vla_edge.evaluate.video_stream import COMPRESSED_VIDEO, VIDEO, VideoStream, pixels
from vla_edge.observe.align import FASTEST_CAMERA_HZ, FRAME_HISTORY, nearest
from vla_edge.observe.image import ImageError, decode_compressed, decode_image
from vla_edge.types import NANOSECONDS, Observation

# Joint states and frames of further cameras may be this much older than a frame: what the aligner of the live nodes
# allows, so that the same recording gives the same observations.
MAX_JOINT_AGE_S = 0.1
MAX_CAMERA_SKEW_S = 0.1
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
    """A chosen frame, still serialized or, of a video, not yet an array, waiting for the other cameras and for the joint
    states around and after it."""

    stamp_ns: int
    log_ns: int
    images: dict[str, tuple[int, object]]
    instruction: str
    until_ns: int | None = None
    before: tuple[_Pending, ...] = ()

    def offer(self, camera: str, stamp_ns: int, picture) -> None:
        """Takes the frame of another camera when it is the newest that is not newer than this one."""
        for earlier in self.before:
            earlier.offer(camera, stamp_ns, picture)
        if self.stamp_ns - MAX_CAMERA_SKEW_S * NANOSECONDS <= stamp_ns <= self.stamp_ns:
            if camera not in self.images or self.images[camera][0] < stamp_ns:
                self.images[camera] = (stamp_ns, picture)


class FrameStream:
    """One run through a bag.

    Args:
        storage: the bag.
        topics: topic -> (part, camera), part being "camera", "joints", "command" or "instruction".
        cameras: the first one sets the pace.
        names: joints of the observations, in this order.
        aliases: joint name in the bag -> name in `names`.
        rate_hz: frames per second of bag at most; all of them when None.
        horizon_s: how much of the motion after each frame is kept with it.
        skipped: counts what is left out, by reason.
        lags, instructed: as of `Bag.frames`.
    """

    def __init__(
        self,
        storage: Storage,
        topics: Mapping[str, tuple[str, str]],
        cameras: tuple[str, ...],
        names: tuple[str, ...],
        aliases: Mapping[str, str],
        rate_hz: float | None,
        horizon_s: float,
        skipped: Counter[str],
        lags: Sequence[float] = (),
        instructed: bool = True,
    ):
        self._storage, self._skipped = storage, skipped
        self._videos = {
            topic: VideoStream(camera, skipped)
            for topic, (part, camera) in topics.items() if part == "camera" and storage.topics[topic] in VIDEO
        }  # fmt: skip
        self._cameras, self._topics, self._names = cameras, topics, names
        self._period_ns = NANOSECONDS / rate_hz if rate_hz else 0.0
        self._horizon_ns = round(horizon_s * NANOSECONDS)
        self._measured = JointWindow(names)
        self._measured_reader = JointReader(self._storage, names, aliases)
        self._commanded = JointWindow(names) if any(part == "command" for part, _ in topics.values()) else None
        self._commanded_reader = JointReader(self._storage, names, aliases)
        self._lags_ns = [round(lag * NANOSECONDS) for lag in lags]
        kept = FRAME_HISTORY + int(max(lags, default=0.0) * FASTEST_CAMERA_HZ)
        self._others: dict[str, deque[tuple[int, object]]] = {camera: deque(maxlen=kept) for camera in cameras[1:]}
        self._recent: deque[_Pending] = deque(maxlen=kept)  # of the first camera, where a frame is to know them
        self._instruction: str | None = None if instructed else ""
        self._pending: deque[_Pending] = deque()
        self._origin_ns: int | None = None
        self._slot = -1
        self._newest_ns: int | None = None

    def frames(self) -> Iterator[Frame]:
        """Frames in order of their stamps.

        Raises:
            BagError: no message carries all the joints.
        """
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
                else:
                    for stamp, picture in self._pictures(raw):
                        yield from self._add_picture(camera, stamp, raw.log_ns, picture)
            except BagError:
                self._skipped[f"{raw.msgtype} that does not decode"] += 1
            for frame in self._ready(raw.log_ns):
                seen += 1
                yield frame
        for topic, video in self._videos.items():
            for stamp, picture in video.end():
                yield from self._add_picture(self._topics[topic][1], stamp, self._storage.end_ns, picture)
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
        text = str(self._storage.deserialize(raw).data)
        # An empty instruction withdraws the last one; the live node serves nothing after it either.
        self._instruction = text if text.strip() else None
        for pending in self._pending:
            if pending.until_ns is None:
                pending.until_ns = raw.log_ns

    def _add_joints(self, raw: RawMessage, kind: str, window: JointWindow, reader: JointReader) -> None:
        stamp = self._storage.header_stamp(raw)
        if window.newest_ns is not None and stamp < window.newest_ns - CLOCK_RESET_S * NANOSECONDS:
            window.clear()
            self._skipped[f"{kind} after the clock was set back"] += 1
        positions = reader.positions(raw)
        if positions is None:
            self._skipped[f"{kind} without all joints"] += 1
        elif not np.isfinite(positions).all():
            self._skipped[f"{kind} without finite positions"] += 1
        elif not window.add(stamp, positions, raw):
            self._skipped[f"{kind} with a stamp not newer than the last"] += 1

    def _pictures(self, raw: RawMessage) -> list[tuple[int, object]]:
        """Stamp and picture of each frame that a message completes; the message itself where it is a picture."""
        stamp, video = self._storage.header_stamp(raw), self._videos.get(raw.topic)
        if video is None:
            return [(stamp, raw)]
        message = self._storage.deserialize(raw)
        told = message.format if raw.msgtype == COMPRESSED_VIDEO else message.encoding
        try:
            return video.push(stamp, told, message.data)
        except ImageError as error:
            self._skipped[f"frame of camera {self._topics[raw.topic][1]}: {error}"] += 1
            return []

    def _add_picture(self, camera: str, stamp: int, log_ns: int, picture) -> Iterator[Frame]:
        if camera == self._cameras[0]:
            yield from self._add_frame(stamp, log_ns, picture)
        else:
            self._add_other(camera, stamp, picture)

    def _add_frame(self, stamp: int, log_ns: int, picture) -> Iterator[Frame]:
        if self._newest_ns is not None and stamp <= self._newest_ns:
            if stamp > self._newest_ns - CLOCK_RESET_S * NANOSECONDS:
                self._skipped["frame with a stamp not newer than the last"] += 1
                return
            yield from self._ready(None)
            self._origin_ns, self._slot = None, -1
            self._recent.clear()
        gap_ns = stamp - self._newest_ns if self._origin_ns is not None else 0
        self._newest_ns = stamp
        due = self._is_due(stamp, gap_ns)
        pending = _Pending(stamp, log_ns, {self._cameras[0]: (stamp, picture)}, self._instruction)
        if self._lags_ns:
            self._recent.append(pending)
        if not due:
            return
        if self._instruction is None:
            self._skipped["frame before the first instruction"] += 1
            return
        earlier = [nearest(self._recent, stamp - lag) for lag in self._lags_ns]
        pending.before = tuple(
            _Pending(each.stamp_ns, log_ns, {self._cameras[0]: each.images[self._cameras[0]]}, self._instruction)
            for each in earlier
        )
        for camera, recent in self._others.items():
            for at, frame in recent:
                pending.offer(camera, at, frame)
        self._pending.append(pending)

    def _add_other(self, camera: str, stamp: int, picture) -> None:
        self._others[camera].append((stamp, picture))
        for pending in self._pending:
            pending.offer(camera, stamp, picture)

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
            complete &= all(recent and recent[-1][0] >= first.stamp_ns for recent in self._others.values())
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
                window.forget_before(oldest - round(MAX_JOINT_AGE_S * NANOSECONDS) - max(self._lags_ns, default=0))

    def _finish(self, pending: _Pending, end_ns: int) -> Frame | None:
        observation = self._observation(pending)
        if observation is None:
            return None
        measured, commanded = (
            window and window.between(pending.stamp_ns, end_ns, pending.until_ns)
            for window in (self._measured, self._commanded)
        )
        return Frame(observation, measured, commanded)

    def _observation(self, pending: _Pending) -> Observation | None:
        """None, and counted, where something of it is not there."""
        newest = self._measured.as_of(pending.stamp_ns)
        if newest is None or pending.stamp_ns - newest[0] > MAX_JOINT_AGE_S * NANOSECONDS:
            self._skipped[f"frame without a joint state of the {MAX_JOINT_AGE_S:g} s before it"] += 1
            return None
        images: dict[str, np.ndarray] = {}
        for camera in self._cameras:
            if camera not in pending.images:
                self._skipped[f"frame without one of camera {camera} near it"] += 1
                return None
            picture = pending.images[camera][1]
            try:
                is_message = isinstance(picture, RawMessage)
                images[camera] = _pixels(self._storage.deserialize(picture)) if is_message else pixels(picture)
            except ImageError as error:
                self._skipped[f"frame of camera {camera}: {error}"] += 1
                return None
            except BagError:
                self._skipped[f"frame of camera {camera} that does not decode"] += 1
                return None
        joints = self._measured_reader.state(newest[1], newest[0])
        before = tuple(filter(None, map(self._observation, pending.before)))
        return Observation(pending.stamp_ns, images, joints, pending.instruction, before)


def _pixels(message) -> np.ndarray:
    """sensor_msgs Image or CompressedImage -> (H, W, 3) uint8 RGB. Raises ImageError."""
    if hasattr(message, "encoding"):
        return decode_image(message.encoding, message.height, message.width, message.step, message.data)
    return decode_compressed(message.data, format=message.format)
