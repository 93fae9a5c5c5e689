"""A LeRobot dataset directory as the policy would have seen it, read without the lerobot package.

What a bag tells by topics, a dataset tells by features: `observation.state` are the measured joints, named by the
feature's `names`; `action` what they were told; `observation.images.<camera>` the cameras; the task is the instruction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vla_edge.evaluate.frame_stream import Frame
from vla_edge.evaluate.lerobot_files import INFO, DatasetError, Episode, describe, read_table
from vla_edge.evaluate.recording import Moment
from vla_edge.evaluate.trajectory import JointTrajectory
from vla_edge.evaluate.video import Video
from vla_edge.observe.image import ImageError, decode_compressed
from vla_edge.policy.preprocess import as_delivered
from vla_edge.policy.spec import ACTION, STATE, PolicySpec
from vla_edge.types import NANOSECONDS, JointState, Observation

__all__ = ["DatasetError", "LeRobotDataset"]

_PICTURES = ("video", "image")


@dataclass(frozen=True)
class _Rows:
    """One episode's values.

    Attributes:
        first: row of its first frame in the file. stamps_ns, seconds: (N,). tasks: (N,) indices.
        state: (N, J) rad. action: (N, J) rad, None where the dataset has none for these joints.
    """

    episode: Episode
    first: int
    seconds: np.ndarray
    stamps_ns: np.ndarray
    tasks: np.ndarray
    state: np.ndarray
    action: np.ndarray | None


class LeRobotDataset:
    """A dataset directory of layout 2.0, 2.1 or 3.0.

    Attributes:
        skipped: reason -> number of frames left out, of the newest pass.
        start_ns: where its timeline begins. warnings: none; a damaged dataset is refused.

    Raises:
        DatasetError: there is none, it is damaged, or of another version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.skipped: Counter[str] = Counter()
        self._said = describe(self.path)
        self._videos: dict[str, Video] = {}
        self._table = self._pictures = None, None

    start_ns = 0
    warnings: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """Seconds of all episodes together."""
        return sum(episode.length for episode in self._said.episodes) / self._said.fps

    @property
    def span_s(self) -> float:
        """Seconds from `start_ns` to the last observation, pauses between episodes included."""
        last = self._said.episodes[-1]
        return last.start_ns / NANOSECONDS + last.length / self._said.fps

    def cameras(self) -> tuple[str, ...]:
        """All of them, by the last part of their features' names."""
        return tuple(name.rpartition(".")[2] for name, f in self._said.features.items() if f["dtype"] in _PICTURES)

    def joint_names(self) -> tuple[str, ...]:
        """Of the state.

        Raises:
            DatasetError: the dataset has no state, or does not name what is in it.
        """
        if STATE not in self._said.features:
            raise DatasetError(f"dataset {self.path} has no feature {STATE}; record it again with the joints")
        if (names := self._names(STATE)) is None:
            raise DatasetError(
                f"{self.path / INFO} does not name the joints of {STATE}; write them into its `names`, in order"
            )
        return names

    def frames(
        self,
        cameras: tuple[str, ...] | None = None,
        joint_names: tuple[str, ...] | None = None,
        rate_hz: float | None = None,
        horizon_s: float = 0.0,
        lags: Sequence[float] = (),
        instructed: bool = True,
    ) -> Iterator[Frame]:
        """Observations in order, each with the motion of the `horizon_s` after it; as `Bag.frames`.

        Raises:
            DatasetError: a camera or joint is missing, or a file is damaged.
        """
        cameras = self.cameras() if cameras is None else tuple(cameras)
        names = self.joint_names() if joint_names is None else tuple(joint_names)
        features, horizon_ns = self._features(cameras), round(horizon_s * NANOSECONDS)
        for rows, index in self._usable(names, rate_hz, instructed):
            end = int(np.searchsorted(rows.stamps_ns, rows.stamps_ns[index] + horizon_ns)) + 1
            measured, commanded = (
                values if values is None else JointTrajectory(names, rows.stamps_ns[index:end], values[index:end])
                for values in (rows.state, rows.action)
            )
            yield Frame(self._observation(rows, index, names, features, lags), measured, commanded)

    def moments(self, spec: PolicySpec) -> Iterator[Moment]:
        """See `Recording.moments`; pictures that were stored cropped are put back into the camera's frame."""
        features = self._features(tuple(camera.name for camera in spec.cameras))
        for rows, index in self._usable(spec.measured_names, None, spec.reads_instruction):
            read = partial(self._shown, rows, index, features, spec)
            yield Moment(int(rows.stamps_ns[index]), self._told(rows, index), read)

    def close(self) -> None:
        """Lets go of the files."""
        for video in self._videos.values():
            video.close()
        self._videos.clear()

    def __enter__(self) -> LeRobotDataset:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _shown(self, rows: _Rows, index: int, features: dict[str, str], spec: PolicySpec) -> Observation:
        def delivered(seen: Observation) -> Observation:
            images = {camera.name: as_delivered(seen.images[camera.name], camera) for camera in spec.cameras}
            return replace(seen, images=images, before=tuple(map(delivered, seen.before)))

        return delivered(self._observation(rows, index, spec.measured_names, features, spec.lags))

    def _observation(
        self, rows: _Rows, index: int, names: tuple[str, ...], features: dict[str, str], lags: Sequence[float] = ()
    ) -> Observation:
        stamp_ns = int(rows.stamps_ns[index])
        images = {camera: self._picture(rows, index, feature) for camera, feature in features.items()}
        joints = JointState(stamp_ns, names, rows.state[index])
        earlier = [int(np.abs(rows.stamps_ns - (stamp_ns - lag * NANOSECONDS)).argmin()) for lag in lags]
        before = tuple(
            self._observation(rows, place, names, features) for place in earlier if np.isfinite(rows.state[place]).all()
        )
        return Observation(stamp_ns, images, joints, self._told(rows, index), before)

    def _told(self, rows: _Rows, index: int) -> str:
        return self._said.tasks.get(int(rows.tasks[index]), "")

    def _picture(self, rows: _Rows, index: int, feature: str) -> np.ndarray:
        if feature in rows.episode.videos:
            path, begin = rows.episode.videos[feature]
            if feature not in self._videos or self._videos[feature].path != path:
                if feature in self._videos:
                    self._videos.pop(feature).close()
                self._videos[feature] = Video(path)
            return self._videos[feature].at(begin + float(rows.seconds[index]), 0.5 / self._said.fps)
        key = rows.episode.data, feature
        if self._pictures[0] != key:
            self._pictures = key, read_table(rows.episode.data, [feature])[feature]
        stored = self._pictures[1][rows.first + index].as_py() or {}
        try:
            return decode_compressed(stored.get("bytes") or b"", format="image in parquet")
        except ImageError as error:
            raise DatasetError(
                f"row {rows.first + index} of {rows.episode.data} has no picture {feature} ({error}); copy it again"
            ) from error

    def _usable(self, names: tuple[str, ...], rate_hz: float | None, instructed: bool) -> Iterator[tuple[_Rows, int]]:
        """Rows to observe, at most `rate_hz` of them in a second of an episode."""
        columns = self._columns(STATE, names)
        if columns is None:
            known = self.joint_names()
            lacking = [name for name in names if name not in known]
            raise DatasetError(
                f"dataset {self.path} has no joint {', '.join(lacking[:4])}{' and more' if len(lacking) > 4 else ''}, "
                f"which the policy needs; it has {', '.join(known)}"
            )
        told = self._columns(ACTION, names) if ACTION in self._said.features else None
        self.skipped.clear()
        for episode in self._said.episodes:
            rows, slot = self._rows(episode, columns, told), -1
            for index, second in enumerate(rows.seconds):
                if rate_hz is not None:
                    # the frame nearest to each tick, where frames do not fall on ticks
                    at = int((second - rows.seconds[0] + 0.5 / self._said.fps) * rate_hz)
                    if at <= slot:
                        continue
                    slot = at
                if not np.isfinite(rows.state[index]).all():
                    self.skipped["frame without finite joint positions"] += 1
                elif instructed and not self._told(rows, index).strip():
                    self.skipped["frame without an instruction"] += 1
                else:
                    yield rows, index

    def _rows(self, episode: Episode, columns: list[int], told: list[int] | None) -> _Rows:
        wanted = ["episode_index", "timestamp", "task_index", STATE, *([ACTION] if told is not None else ())]
        if self._table[0] != (episode.data, len(wanted)):
            self._table = (episode.data, len(wanted)), read_table(episode.data, wanted)
        table = self._table[1]
        mine = np.flatnonzero(table["episode_index"].to_numpy() == episode.index)
        if len(mine) != episode.length or not len(mine) or mine[-1] - mine[0] + 1 != len(mine):
            raise DatasetError(
                f"{episode.data} holds {len(mine)} rows of episode {episode.index}, which has {episode.length}; copy "
                "the dataset again"
            )
        table = table.slice(int(mine[0]), len(mine))
        seconds = table["timestamp"].to_numpy().astype(np.float64)
        stamps = episode.start_ns + np.round(seconds * NANOSECONDS).astype(np.int64)
        if not np.isfinite(seconds).all() or (np.diff(stamps) <= 0).any():
            raise DatasetError(
                f"the timestamps of episode {episode.index} in {episode.data} do not grow; copy it again"
            )
        state, action = (
            None if chosen is None else self._matrix(table[name], episode, name)[:, chosen]
            for name, chosen in ((STATE, columns), (ACTION, told))
        )
        return _Rows(episode, int(mine[0]), seconds, stamps, table["task_index"].to_numpy(), state, action)

    def _matrix(self, column, episode: Episode, name: str) -> np.ndarray:
        """(N, D) float64."""
        wide = self._said.features[name]["shape"][0]
        values = column.combine_chunks()
        values = values.flatten() if hasattr(values, "flatten") and hasattr(values.type, "value_type") else values
        values = np.asarray(values.to_numpy(zero_copy_only=False), np.float64)
        if values.size != len(column) * wide:
            raise DatasetError(f"{name} of episode {episode.index} in {episode.data} is not {wide} wide; copy it again")
        return values.reshape(len(column), wide)

    def _features(self, cameras: tuple[str, ...]) -> dict[str, str]:
        """Camera -> feature. Raises DatasetError."""
        there = {name.rpartition(".")[2]: name for name, f in self._said.features.items() if f["dtype"] in _PICTURES}
        missing = [camera for camera in cameras if camera not in there]
        if missing:
            raise DatasetError(
                f"dataset {self.path} has no camera {', '.join(missing)}, which the policy needs; it has "
                f"{', '.join(there) or 'none'}: rename the feature or record that camera"
            )
        return {camera: there[camera] for camera in cameras}

    def _columns(self, feature: str, names: tuple[str, ...]) -> list[int] | None:
        """Where in the feature each joint is; None where one is not there."""
        there = {name: i for i, name in enumerate(self._names(feature) or ())}
        return [there[name] for name in names] if set(names) <= set(there) else None

    def _names(self, feature: str) -> tuple[str, ...] | None:
        """Joints of a feature: a list, or lists by group; LeRobot's robots end them in `.pos`."""
        said = self._said.features[feature]
        names = said.get("names")
        if isinstance(names, dict):
            names = [name for group in names.values() for name in (group if isinstance(group, list) else [])]
        if not isinstance(names, list) or len(names) != said["shape"][0]:
            return None
        return tuple(str(name).removesuffix(".pos") for name in names)
