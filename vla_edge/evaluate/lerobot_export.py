"""A recording -> a LeRobot dataset of layout 3.0, for fine-tuning on what a robot did.

One episode for every instruction and every stretch without a pause. At each step, `observation.state` are the joints
measured at the picture, and `action` what they were told for one step later, or where they then were if the recording
holds no commands: what point 0 of a chunk at this observation would have been.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vla_edge.evaluate.bag import Bag
from vla_edge.evaluate.contract import TopicContract
from vla_edge.evaluate.frame_stream import Frame
from vla_edge.evaluate.lerobot_files import DatasetError
from vla_edge.evaluate.lerobot_writer import DatasetWriter
from vla_edge.files import whole_directory
from vla_edge.types import NANOSECONDS

# As many missing steps are bridged by showing the last picture again; more of them end the episode.
MOST_MISSING = 2


@dataclass
class Exported:
    """What came of it.

    Attributes:
        episodes, frames: written. bridged: of the frames, those whose picture is that of the frame before.
        skipped: reason -> frames and messages left out.
    """

    episodes: int = 0
    frames: int = 0
    bridged: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Step:
    """A row to be: pictures by camera, (J,) rad twice, the instruction, and whether the pictures are old."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    instruction: str
    bridged: bool


def export_lerobot(
    recording: str | Path,
    output: str | Path,
    fps: float,
    cameras: tuple[str, ...] | None = None,
    joint_names: tuple[str, ...] | None = None,
    contract: TopicContract | None = None,
    video: bool = True,
    robot_type: str = "",
    progress: Callable[[float, int], None] | None = None,
) -> Exported:
    """Writes the dataset, whole or not at all.

    Args:
        fps: steps per second; frames nearest to them are taken.
        cameras, joint_names: all of the recording's when None.
        video: H.264; otherwise PNG in parquet, without loss.
        progress: called with the fraction of the recording that is done, and frames so far.

    Raises:
        BagError: the recording cannot be read, or lacks a part.
        DatasetError: something is at `output`, or nothing in the recording can be used.
    """
    output = Path(output)
    if output.exists():
        raise DatasetError(f"{output} is there already and a dataset is never overwritten; choose another name")
    found = Exported()
    with whole_directory(output, DatasetError, replaces=False) as directory, Bag(recording, contract) as bag:
        names = joint_names or bag.joint_names()
        shown = cameras or bag.cameras()
        writer = DatasetWriter(directory, fps, names, video, robot_type)
        for episode in _episodes(bag, shown, names, fps, found):
            for step in episode:
                writer.add(step.images, step.state, step.action, step.instruction)
                found.bridged += step.bridged
            found.episodes += writer.end_episode()
            found.frames = writer.frames
            if progress is not None:
                progress(min(1.0, writer.frames / fps / max(bag.duration_s, 1e-9)), writer.frames)
        found.skipped += bag.skipped
        if not found.frames:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(found.skipped.items()))
            raise DatasetError(f"nothing in {recording} can be used: {reasons or 'it has no frames'}")
        writer.finish()
    return found


def _episodes(bag: Bag, cameras, names, fps: float, found: Exported) -> Iterator[Iterator[_Step]]:
    """Stretches of steps; each has to be used up before the next is asked for."""
    reach_s = (MOST_MISSING + 2) / fps
    frames = bag.frames(cameras, names, fps, reach_s)
    first = next(frames, None)
    while first is not None:
        rest: list[Frame | None] = [None]
        yield _steps(first, frames, names, fps, found, rest)
        first = rest[0]


def _steps(first: Frame, frames: Iterator[Frame], names, fps: float, found: Exported, rest: list) -> Iterator[_Step]:
    """Steps from `first` on; `rest[0]` becomes the first frame that belongs to the next episode."""
    period_ns, frame = NANOSECONDS / fps, first
    while frame is not None:
        following = next(frames, None)
        gap, same = math.inf, False
        if following is not None:
            gap = (following.observation.stamp_ns - frame.observation.stamp_ns) / period_ns
            same = following.observation.instruction == frame.observation.instruction
        goes_on = same and 0 < gap < MOST_MISSING + 1.5
        for late in range(max(1, round(gap)) if goes_on else 1):
            step = _step(frame, names, round(late * period_ns), round(period_ns), late > 0)
            if step is None:
                found.skipped["frame after which no motion is known"] += 1
            else:
                yield step
        if not goes_on:
            rest[0] = following
            return
        frame = following


def _step(frame: Frame, names, late_ns: int, period_ns: int, bridged: bool) -> _Step | None:
    seen, stamp_ns = frame.observation, frame.observation.stamp_ns + late_ns
    state = frame.measured.at([stamp_ns], names)[0] if bridged else seen.joints.position
    action = np.full(len(names), np.nan)
    for told in (frame.commanded, frame.measured):
        if told is not None and not np.isfinite(action).all():
            action = told.at([stamp_ns + period_ns], names)[0]
    if not (np.isfinite(state).all() and np.isfinite(action).all()):
        return None
    return _Step(dict(seen.images), state, action, seen.instruction, bridged)
