"""A moving picture out of a recording: the robot from outside, what it sees, and what it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.evaluate.contract import find_topic
from vla_edge.evaluate.storage import BagError, Storage
from vla_edge.observe.image import decode_compressed, decode_image

SUFFIXES = (".gif", ".webp")


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
    main_topic: str = "overview/image",
    inset_topic: str = "head/image",
    width: int = 480,
    fps: float = 5.0,
    speed: float = 1.0,
) -> Path:
    """Writes an animated .gif or .webp of the scenes.

    Args:
        main_topic: fills the picture; the inset fills it where the bag does not have it.
        inset_topic: drawn small in a corner.
        speed: of playing; 2 is twice as fast as it was.

    Raises:
        BagError: the bag has neither topic, no picture in the scenes, or the suffix is not one of `SUFFIXES`.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise BagError(f"film {path} must end in one of {', '.join(SUFFIXES)}")
    frames = [Image.fromarray(frame) for frame in _frames(bag, scenes, main_topic, inset_topic, width, fps, speed)]
    if not frames:
        raise BagError(f"bag {bag} has no pictures of the {len(scenes)} scenes; was the camera recorded?")
    if path.suffix == ".gif":
        # One palette for all frames: without it flat surfaces flicker, and nothing compresses.
        palette = _palette(frames)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return path


def _frames(bag, scenes, main_topic: str, inset_topic: str, width: int, fps: float, speed: float):
    with Storage(bag) as storage:
        main, inset = (_topic(storage, name) for name in (main_topic, inset_topic))
        if main is None and inset is None:
            raise BagError(f"bag {bag} has neither {main_topic} nor {inset_topic}; record a camera")
        main, inset = (main, inset) if main else (inset, None)
        newest: dict[str, object] = {}
        remaining = sorted(scenes, key=lambda scene: scene.begin_ns)
        step_ns, due_ns = round(1e9 * speed / fps), 0
        for raw in storage.messages({topic for topic in (main, inset) if topic}):
            newest[raw.topic] = raw
            while remaining and raw.log_ns > remaining[0].end_ns:
                remaining.pop(0)
            if not remaining:
                return
            scene = remaining[0]
            if raw.topic != main or raw.log_ns < max(scene.begin_ns, due_ns):
                continue
            due_ns = max(due_ns + step_ns, raw.log_ns - step_ns // 2 + step_ns)
            pictures = [_pixels(storage.deserialize(newest[t])) if t in newest else None for t in (main, inset)]
            yield compose(pictures[0], pictures[1], scene.caption, scene.good, width)


def _pixels(message) -> np.ndarray:
    if hasattr(message, "format"):
        return decode_compressed(message.data, format=message.format)
    return decode_image(message.encoding, message.height, message.width, message.step, message.data)


def _topic(storage: Storage, name: str) -> str | None:
    for candidate in (f"{name}/compressed", name):
        topic = find_topic(candidate, storage.topics)
        if topic and storage.counts[topic]:
            return topic
    return None


def compose(main: np.ndarray, inset: np.ndarray | None, caption: str, good: bool, width: int) -> np.ndarray:
    """One frame, (H, W, 3) uint8 RGB."""
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
    scale = 0.42 * width / 480
    cv2.putText(out, caption, (bar + 4, height + round(0.66 * bar)), cv2.FONT_HERSHEY_SIMPLEX, scale, (235, 235, 235), 1,
                cv2.LINE_AA)
    return out


def _palette(frames):
    from PIL import Image

    some = frames[:: max(1, len(frames) // 8)][:8]
    strip = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for i, frame in enumerate(some):
        strip.paste(frame, (0, i * frame.height))
    return strip.quantize(colors=128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
