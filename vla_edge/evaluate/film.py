"""A moving picture out of a recording: the robot from outside, what it sees, and what it was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.evaluate.contract import find_topic
from vla_edge.evaluate.storage import BagError, RawMessage, Storage
from vla_edge.observe.image import decode_compressed, decode_image

SUFFIXES = (".gif", ".webp")
# What the simulation publishes for this purpose: its scene and its state.
EPISODE, STATE = "sim/episode", "sim/state"


@dataclass(frozen=True)
class Scene:
    """One stretch of the recording.

    Attributes:
        begin_ns, end_ns: log time.
        caption: shown below.
        good: colours the caption's mark.
    """

    begin_ns: int
    end_ns: int
    caption: str
    good: bool


def write_film(
    bag: str | Path,
    path: str | Path,
    scenes: Sequence[Scene],
    camera: str = "head",
    width: int = 480,
    fps: float = 7.5,
    speed: float = 1.0,
) -> Path:
    """Writes an animated .gif or .webp of the scenes.

    A recording of the simulation shows the robot from outside, with the camera's picture in a corner; any other
    recording shows the camera's picture.

    Args:
        camera: name of the recorded camera.
        speed: of playing; 2 is twice as fast as it was.

    Raises:
        BagError: the bag has no picture in the scenes, or the suffix is not one of `SUFFIXES`.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise BagError(f"film {path} must end in one of {', '.join(SUFFIXES)}")
    frames = [Image.fromarray(frame) for frame in _frames(bag, scenes, camera, width, fps / speed)]
    if not frames:
        raise BagError(f"bag {bag} has no pictures of the {len(scenes)} scenes; was the camera recorded?")
    if path.suffix == ".gif":
        # One palette for all frames: without it flat surfaces flicker, and nothing compresses.
        palette = _palette(frames)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return path


def _frames(bag, scenes: Sequence[Scene], camera: str, width: int, rate_hz: float) -> Iterator[np.ndarray]:
    """The pictures, at `rate_hz` of bag time."""
    with Storage(bag) as storage:
        picture = _filled(storage, f"{camera}/image/compressed", f"{camera}/image")
        episode, state = _filled(storage, EPISODE), _filled(storage, STATE)
        if picture is None and state is None:
            raise BagError(f"bag {bag} has neither {camera}/image nor {STATE}; record a camera")
        outside = _Outside(storage) if state is not None and episode is not None else None
        pace = state if outside else picture
        newest: RawMessage | None = None
        left, due_ns = sorted(scenes, key=lambda scene: scene.begin_ns), 0
        for raw in storage.messages({topic for topic in (picture, episode, state) if topic}):
            if raw.topic == picture:
                newest = raw
            elif raw.topic == episode:
                outside.begin(raw)
            while left and raw.log_ns > left[0].end_ns:
                left.pop(0)
            if not left:
                return
            if raw.topic != pace or raw.log_ns < max(left[0].begin_ns, due_ns):
                continue
            due_ns = max(due_ns, raw.log_ns - round(0.5e9 / rate_hz)) + round(1e9 / rate_hz)
            seen = _pixels(storage.deserialize(newest)) if newest is not None else None
            main, inset = (outside.draw(raw), seen) if outside else (seen, None)
            if main is not None:
                yield compose(main, inset, left[0].caption, left[0].good, width)


class _Outside:
    """Draws the recorded simulation from its overview camera."""

    def __init__(self, storage: Storage):
        from vla_edge.sim.view import RecordedView

        self._storage, self._view, self._begun = storage, RecordedView(), False

    def begin(self, raw: RawMessage) -> None:
        told = json.loads(self._storage.deserialize(raw).data)
        self._view.begin(int(told["seed"]), str(told["tier"]))
        self._begun = True

    def draw(self, raw: RawMessage) -> np.ndarray | None:
        return self._view.render(self._storage.deserialize(raw).data, 480, 640) if self._begun else None


def _pixels(message) -> np.ndarray:
    if hasattr(message, "format"):
        return decode_compressed(message.data, format=message.format)
    return decode_image(message.encoding, message.height, message.width, message.step, message.data)


def _filled(storage: Storage, *names: str) -> str | None:
    """The first of these topics that has messages."""
    for name in names:
        topic = find_topic(name, storage.topics)
        if topic and storage.counts[topic]:
            return topic
    return None


def compose(main: np.ndarray, inset: np.ndarray | None, caption: str, good: bool, width: int) -> np.ndarray:
    """One frame, (H, W, 3) uint8 RGB: the main picture, the inset in its corner, the caption below."""
    import cv2

    height = round(main.shape[0] * width / main.shape[1])
    bar = max(24, round(0.07 * height))
    out = np.full((height + bar, width, 3), 24, np.uint8)
    out[:height] = cv2.resize(main, (width, height), interpolation=cv2.INTER_AREA)
    if inset is not None:
        small_w = round(0.34 * width)
        small_h = round(inset.shape[0] * small_w / inset.shape[1])
        small = cv2.resize(inset, (small_w, small_h), interpolation=cv2.INTER_AREA)
        cv2.rectangle(small, (0, 0), (small_w - 1, small_h - 1), (240, 240, 240), 1)
        out[8 : 8 + small_h, width - small_w - 8 : width - 8] = small
    mark = (90, 200, 110) if good else (230, 90, 80)
    cv2.circle(out, (bar // 2 + 2, height + bar // 2), bar // 5, mark, -1, cv2.LINE_AA)
    at, scale = (bar + 4, height + round(0.66 * bar)), 0.42 * width / 480
    cv2.putText(out, caption, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (235, 235, 235), 1, cv2.LINE_AA)
    return out


def _palette(frames):
    """256 colours of some of the frames. Maximum coverage: small objects have the colours that matter."""
    from PIL import Image

    some = frames[:: max(1, len(frames) // 8)][:8]
    strip = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for i, frame in enumerate(some):
        strip.paste(frame, (0, i * frame.height))
    return strip.quantize(colors=256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
