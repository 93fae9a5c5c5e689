"""From streams that arrive when they like to one observation: the newest frame, the joints at its moment, the words.

Stamps (ROS time) say which things belong together; arrivals (steady clock) say whether a source has gone silent, so
that a jump of the ROS clock can neither hide a dead camera nor condemn a living one. What was overtaken on its way is
put where it belongs and paces nothing; what is sent again is no news; stamps that fall back further than a message can
be late mean that the clock was set back. The joints of an observation are
the newest not newer than its frame, exactly as `evaluate.bag` takes them from a recording.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import numpy as np

from vla_edge.observe.image import ImageError
from vla_edge.types import NANOSECONDS, JointState, Observation

JOINT_HISTORY = 1024
FRAME_HISTORY = 8
FASTEST_CAMERA_HZ = 120  # of which frames are kept as far back as a policy looks


class Readiness(Enum):
    """Whether an observation can be made, and if not, why."""

    WAITING = "waiting"
    STALE = "stale"
    READY = "ready"


@dataclass(frozen=True)
class Frame:
    """One picture, decoded only if it is used.

    Attributes:
        stamp_ns: when it was taken, ROS time.
        arrival_ns: when it arrived, steady clock.
        decode: gives (H, W, 3) uint8 RGB, or raises ImageError.
        fingerprint: of the pixels, to notice a camera that sends one picture for ever; None where nobody asks.
        slow: whether decoding takes long enough for another thread to help.
    """

    stamp_ns: int
    arrival_ns: int
    decode: Callable[[], np.ndarray]
    fingerprint: int | None = None
    slow: bool = False


@dataclass(frozen=True)
class Alignment:
    """What `Aligner.align` found.

    Attributes:
        readiness: READY when there is an observation.
        reason: one sentence for the operator otherwise.
        observation: what the policy is shown.
        arrival_ns: when the observation's frame arrived, steady clock.
    """

    readiness: Readiness
    reason: str = ""
    observation: Observation | None = None
    arrival_ns: int = 0


class Aligner:
    """Holds the newest of everything and puts it together on request. Safe to feed and to ask from different threads.

    Args:
        cameras: of the policy; the first one sets the pace.
        max_skew: s that the joint state and the frames of further cameras may be older than the observation.
        max_age: s without a new message after which a source counts as silent, and the latest that a message may come
            after a newer one.
        frozen_after: s of one and the same picture after which a camera counts as frozen; 0 never looks.
        lags: s before an observation at which it is to know those before it, see `policy.spec.PolicySpec`.
        on_thread: called first in threads that help to decode, for example to ask for their priority.
        instructed: whether nothing is observed before an instruction has come. Where none is needed, an empty one still
            withdraws what came before it.

    Attributes:
        rejected: reason -> pictures that did not decode when they were needed.
        counts: "late", "repeated" or "missed" and a source -> messages that were overtaken, came again, or are missing
            by the camera's own rhythm.
    """

    def __init__(
        self, cameras: Sequence[str], max_skew: float = 0.1, max_age: float = 0.5, frozen_after: float = 0.0,
        lags: Sequence[float] = (), instructed: bool = True, on_thread: Callable[[], object] = lambda: None,
    ):  # fmt: skip
        self._cameras = tuple(cameras)
        self._max_skew_ns = round(max_skew * NANOSECONDS)
        self._max_age_ns = round(max_age * NANOSECONDS)
        self._frozen_after_ns = round(frozen_after * NANOSECONDS)
        self._changed_ns: dict[str, int] = {}
        self._lock = threading.Lock()
        self._lags_ns = [round(lag * NANOSECONDS) for lag in lags]
        kept = FRAME_HISTORY + int(max(lags, default=0.0) * FASTEST_CAMERA_HZ)
        self._frames: dict[str, deque[Frame]] = {camera: deque(maxlen=kept) for camera in cameras}
        self._joints: deque[JointState] = deque(maxlen=JOINT_HISTORY)
        self._joints_arrival_ns = 0
        self._instruction: str | None = None if instructed else ""
        # no thread before the first is asked for
        self._helpers = ThreadPoolExecutor(max(1, len(cameras) - 1), "decode", on_thread)
        self.rejected: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def add_frame(self, camera: str, frame: Frame) -> bool:
        """A picture of one of the cameras; whether it is the newest."""
        with self._lock:
            frames = self._frames[camera]
            newest = self._order(f"camera {camera}", frames, frame.stamp_ns)
            if newest:
                self._count_missed(camera, frames, frame.stamp_ns)
                if not frames or frame.fingerprint is None or frame.fingerprint != frames[-1].fingerprint:
                    self._changed_ns[camera] = frame.arrival_ns
                frames.append(frame)
            elif frame.stamp_ns not in (stamps := [other.stamp_ns for other in frames]):
                # Further cameras are looked up as of the first one's newest frame, which this may be the nearest to.
                older = sum(stamp < frame.stamp_ns for stamp in stamps)
                if older:
                    if len(frames) == frames.maxlen:
                        frames.popleft()
                        older -= 1
                    frames.insert(older, frame)
            return newest

    def add_joints(self, joints: JointState, arrival_ns: int) -> None:
        """Measured joints; those that were overtaken by newer ones are not needed any more."""
        with self._lock:
            if self._order("joint states", self._joints, joints.stamp_ns):
                self._joints.append(joints)
                self._joints_arrival_ns = arrival_ns

    def ages(self, now_ns: int) -> dict[str, float]:
        """Source -> s since its newest message arrived; those that never came are left out.

        Args:
            now_ns: steady clock.
        """
        with self._lock:
            arrivals = {f"camera {name}": frames[-1].arrival_ns for name, frames in self._frames.items() if frames}
            if self._joints:
                arrivals["joint states"] = self._joints_arrival_ns
        return {source: (now_ns - at) / NANOSECONDS for source, at in arrivals.items()}

    @property
    def instruction(self) -> str | None:
        """What the policy is asked."""
        return self._instruction

    def set_instruction(self, text: str | None) -> None:
        """What the policy is asked from now on; None when it is asked nothing."""
        with self._lock:
            self._instruction = text

    def forget(self) -> None:
        """Drops frames and joints, for a start into a new episode; the instruction stays."""
        with self._lock:
            for frames in self._frames.values():
                frames.clear()
            self._joints.clear()

    def align(self, now_ns: int) -> Alignment:
        """The newest observation, or why there is none.

        Args:
            now_ns: steady clock.
        """
        with self._lock:
            problem = self._waiting() or self._silent(now_ns)
            if problem:
                return problem
            newest = self._frames[self._cameras[0]][-1]
            chosen, joints = self._at(newest)
            pace = self._frames[self._cameras[0]]
            earlier = [self._at(nearest(pace, newest.stamp_ns - lag)) for lag in self._lags_ns]
            instruction = self._instruction
        for what, found in (*chosen.items(), ("joint state", joints)):
            if found is None:
                limit = f"{self._max_skew_ns / 1e6:.0f} ms"
                return Alignment(Readiness.STALE, f"no {what} within {limit} before the newest frame")
        try:
            # Outside the lock: a picture takes a millisecond to decode, and streams must not wait for it.
            known = [(frames, then) for frames, then in earlier if then is not None and None not in frames.values()]
            images, *others = self._decoded([chosen, *(frames for frames, _ in known)])
            before = tuple(
                Observation(frames[self._cameras[0]].stamp_ns, pictures, then, instruction)
                for (frames, then), pictures in zip(known, others)
            )
        except ImageError as error:
            with self._lock:
                self.rejected[str(error)] += 1
            return Alignment(Readiness.STALE, str(error))
        observation = Observation(newest.stamp_ns, images, joints, instruction, before)
        return Alignment(Readiness.READY, "", observation, newest.arrival_ns)

    def _decoded(self, moments: Sequence[Mapping[str, Frame]]) -> list[dict[str, np.ndarray]]:
        """Camera -> picture, of each moment; slow ones of further cameras by threads of their own, meanwhile.

        Raises:
            ImageError: of the first that cannot be decoded.
        """
        first = self._cameras[0]
        helped = {
            (place, camera): self._helpers.submit(frame.decode)
            for place, frames in enumerate(moments)
            for camera, frame in frames.items()
            if frame.slow and camera != first
        }
        return [
            {
                camera: helped[place, camera].result() if (place, camera) in helped else frame.decode()
                for camera, frame in frames.items()
            }
            for place, frames in enumerate(moments)
        ]

    def _order(self, source: str, history: deque, stamp_ns: int) -> bool:
        """Whether something of that stamp is the newest of its source; forgets a past that a clock has taken back."""
        if not history or stamp_ns > history[-1].stamp_ns:
            return True
        if history[-1].stamp_ns - stamp_ns > self._max_age_ns:
            history.clear()
            return True
        self.counts[f"{'repeated' if stamp_ns == history[-1].stamp_ns else 'late'} {source}"] += 1
        return False

    def _count_missed(self, camera: str, frames: deque, stamp_ns: int) -> None:
        """Frames that the camera's rhythm, the median of the last ones, has room for."""
        if len(frames) < FRAME_HISTORY:
            return
        stamps = [frame.stamp_ns for frame in frames]
        rhythm = sorted(b - a for a, b in zip(stamps, stamps[1:]))[len(stamps) // 2 - 1]
        missing = round((stamp_ns - stamps[-1]) / rhythm) - 1
        if missing > 0:
            self.counts[f"missed camera {camera}"] += missing

    def _waiting(self) -> Alignment | None:
        missing = [f"camera {camera}" for camera, frames in self._frames.items() if not frames]
        missing += [] if self._joints else ["joint states"]
        missing += ["an instruction"] if self._instruction is None else []
        return Alignment(Readiness.WAITING, f"waiting for {', '.join(missing)}") if missing else None

    def _silent(self, now_ns: int) -> Alignment | None:
        ages = {f"camera {camera}": now_ns - frames[-1].arrival_ns for camera, frames in self._frames.items()}
        ages["joint states"] = now_ns - self._joints_arrival_ns
        silent = [f"{what} silent for {age / 1e9:.1f} s" for what, age in ages.items() if age > self._max_age_ns]
        if self._frozen_after_ns:
            for camera, changed_ns in self._changed_ns.items():
                shown_ns = self._frames[camera][-1].arrival_ns - changed_ns
                if shown_ns > self._frozen_after_ns:
                    silent.append(f"camera {camera} shows one picture since {shown_ns / 1e9:.1f} s")
        return Alignment(Readiness.STALE, ", ".join(silent)) if silent else None

    def _at(self, frame: Frame) -> tuple[dict[str, Frame | None], JointState | None]:
        """What belongs to a frame of the first camera."""
        chosen = {camera: self._as_of(self._frames[camera], frame.stamp_ns) for camera in self._cameras}
        return chosen, self._as_of(self._joints, frame.stamp_ns)

    def _as_of(self, history, stamp_ns: int):
        """The newest entry not newer than `stamp_ns` and not older than the skew allows."""
        for entry in reversed(history):
            if entry.stamp_ns <= stamp_ns:
                return entry if stamp_ns - entry.stamp_ns <= self._max_skew_ns else None
        return None


def nearest(history: Iterable, stamp_ns: int):
    """The entry whose stamp is nearest to `stamp_ns`; of two, the later."""
    return min(reversed(tuple(history)), key=lambda entry: abs(entry.stamp_ns - stamp_ns))
