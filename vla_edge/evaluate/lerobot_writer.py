"""Writes LeRobot datasets of layout 3.0, without the lerobot package: parquet, MP4 or PNG, and the statistics.

Each episode has a data file of its own and a video of its own for every camera, which the layout allows; so what is
held in memory is one episode's numbers, and its pictures only where they are kept as PNG.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from vla_edge.evaluate.lerobot_files import DatasetError
from vla_edge.policy.spec import ACTION, STATE

CHUNK = 1000
PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH, VIDEO_PATH = f"data/{PLACE}.parquet", "videos/{video_key}/" + f"{PLACE}.mp4"
COUNTERS = {"timestamp": "float32", **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")}
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# Of every so many frames, every so many pixels: statistics of pictures need no more.
PICTURE_EVERY, PIXEL_EVERY = 10, 8

# Tasks are a data frame whose index is the text; pandas finds that in the file's metadata.
_INDEX = "__index_level_0__"
_TEXT = {"pandas_type": "unicode", "numpy_type": "object"}
_NUMBER = {"pandas_type": "int64", "numpy_type": "int64"}
_FRAME = {
    "index_columns": [_INDEX],
    "column_indexes": [{"name": None, "field_name": None, **_TEXT, "metadata": {"encoding": "UTF-8"}}],
    "columns": [
        {"name": "task_index", "field_name": "task_index", **_NUMBER, "metadata": None},
        {"name": None, "field_name": _INDEX, **_TEXT, "metadata": None},
    ],
    "pandas_version": "2.2.0",
}


class DatasetWriter:
    """One dataset directory.

    Args:
        root: existing, empty directory.
        fps: steps per second.
        joint_names: of state and action.
        video: MP4 with H.264; PNG in parquet otherwise.

    Attributes:
        frames: of all finished episodes.

    Raises:
        DatasetError: pyarrow, or PyAV for videos, is not installed.
    """

    def __init__(self, root: Path, fps: float, joint_names: tuple[str, ...], video: bool, robot_type: str = ""):
        try:
            import pyarrow.parquet  # noqa: F401

            if video:
                import av  # noqa: F401
        except ImportError as error:
            raise DatasetError(
                f"datasets are written with pyarrow and PyAV ({error}); run pip install pyarrow av"
            ) from error
        self._root, self._fps, self._video, self._robot_type = root, fps, video, robot_type
        self._names = tuple(joint_names)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict] = []
        self._rows: list[tuple[np.ndarray, np.ndarray, int]] = []
        self._pictures: dict[str, list[bytes]] = {}
        self._films: dict[str, _Film] = {}
        self._all: dict[str, list[np.ndarray]] = {STATE: [], ACTION: []}
        self._pixels: dict[str, list[np.ndarray]] = {}
        self.frames = 0

    def add(self, images: Mapping[str, np.ndarray], state: np.ndarray, action: np.ndarray, task: str) -> None:
        """One step of the running episode: (H, W, 3) uint8 RGB by camera, (J,) rad twice.

        Raises:
            DatasetError: a picture has another size than those before.
        """
        for camera, pixels in images.items():
            key = f"observation.images.{camera}"
            if self._shapes.setdefault(key, pixels.shape) != pixels.shape:
                raise DatasetError(
                    f"camera {camera} changes from {self._shapes[key]} to {pixels.shape}; a dataset has one size for it"
                )
            if self._video:
                if key not in self._films:
                    self._films[key] = _Film(self._path(VIDEO_PATH, video_key=key), pixels.shape, self._fps)
                self._films[key].add(pixels)
            else:
                self._pictures.setdefault(key, []).append(_png(pixels))
            if len(self._rows) % PICTURE_EVERY == 0:
                self._pixels.setdefault(key, []).append(pixels[::PIXEL_EVERY, ::PIXEL_EVERY].reshape(-1, 3))
        self._rows.append((np.float32(state), np.float32(action), self._tasks.setdefault(task, len(self._tasks))))

    def end_episode(self) -> bool:
        """Writes the running episode; False when it has no steps."""
        if not self._rows:
            return False
        import pyarrow as pa
        import pyarrow.parquet as pq

        number, length = len(self._episodes), len(self._rows)
        state, action = (np.array([row[i] for row in self._rows]) for i in (0, 1))
        tasks = [row[2] for row in self._rows]
        vector = pa.list_(pa.float32(), len(self._names))
        columns = {
            STATE: pa.array(state.tolist(), vector),
            ACTION: pa.array(action.tolist(), vector),
            "timestamp": pa.array((np.arange(length) / self._fps).astype(np.float32)),
            "frame_index": pa.array(np.arange(length)),
            "episode_index": pa.array(np.full(length, number)),
            "index": pa.array(self.frames + np.arange(length)),
            "task_index": pa.array(tasks),
        }
        for key, pictures in self._pictures.items():
            rows = [{"bytes": data, "path": f"frame-{i:06d}.png"} for i, data in enumerate(pictures)]
            columns[key] = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        path = self._path(DATA_PATH)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        place = {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
        entry = {
            "episode_index": number, "length": length,
            "tasks": [task for task, index in self._tasks.items() if index in set(tasks)],
            "dataset_from_index": self.frames, "dataset_to_index": self.frames + length,
            "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
            **{f"data/{name}": value for name, value in place.items()},
        }  # fmt: skip
        for key, film in self._films.items():
            film.close()
            entry |= {f"videos/{key}/{name}": value for name, value in place.items()}
            entry |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": length / self._fps}
        for key, values in ((STATE, state), (ACTION, action)):
            self._all[key].append(values)
            entry |= {f"stats/{key}/{name}": value for name, value in statistics(values).items()}
        self._episodes.append(entry)
        self.frames += length
        self._rows, self._pictures, self._films = [], {}, {}
        return True

    def finish(self) -> None:
        """Writes what the dataset says of itself."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        episodes = self._root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes)
        tasks = pa.table({"task_index": list(self._tasks.values()), _INDEX: list(self._tasks)})
        pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(_FRAME)}), self._root / "meta/tasks.parquet")
        self._write("stats.json", self._statistics())
        vector = {"dtype": "float32", "shape": [len(self._names)], "names": list(self._names)}
        features = {STATE: vector, ACTION: vector}
        for key, shape in self._shapes.items():
            dtype = "video" if self._video else "image"
            features[key] = {"dtype": dtype, "shape": list(shape), "names": ["height", "width", "channels"]}
        features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COUNTERS.items()}
        self._write("info.json", {
            "codebase_version": "v3.0", "robot_type": self._robot_type or None, "total_episodes": len(self._episodes),
            "total_frames": self.frames, "total_tasks": len(self._tasks), "chunks_size": CHUNK,
            "data_files_size_in_mb": 100, "video_files_size_in_mb": 500, "fps": _whole(self._fps),
            "splits": {"train": f"0:{len(self._episodes)}"}, "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._video else None, "features": features,
        })  # fmt: skip

    def _statistics(self) -> dict:
        found = {key: statistics(np.concatenate(parts)) for key, parts in self._all.items()}
        for key, parts in self._pixels.items():
            values = statistics(np.concatenate(parts) / 255.0)
            # (3, 1, 1), as they are applied to pictures with channels first
            shaped = {name: np.reshape(value, (3, 1, 1)).tolist() for name, value in values.items() if name != "count"}
            found[key] = shaped | {"count": values["count"]}
        return found

    def _path(self, pattern: str, **more: str) -> Path:
        number = len(self._episodes)
        return self._root / pattern.format(chunk_index=number // CHUNK, file_index=number % CHUNK, **more)

    def _write(self, name: str, content: dict) -> None:
        (self._root / "meta" / name).write_text(json.dumps(content, indent=4), encoding="utf-8")


class _Film:
    """One video file: H.264, a key frame every second picture so that any frame is soon found."""

    def __init__(self, path: Path, shape: tuple[int, ...], fps: float):
        import av

        path.parent.mkdir(parents=True, exist_ok=True)
        self._av = av
        self._container = av.open(str(path), "w")
        rate = Fraction(fps).limit_denominator(1001)
        options = {"g": "2", "crf": "18", "preset": "veryfast"}
        self._stream = self._container.add_stream("libx264", rate, options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = *shape[:2], "yuv420p"

    def add(self, pixels: np.ndarray) -> None:
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


def statistics(values: np.ndarray) -> dict[str, list]:
    """What LeRobot normalizes by, over the rows of (N, D)."""
    found = {name: getattr(values, name)(axis=0).tolist() for name in ("min", "max", "mean", "std")}
    found |= {name: np.quantile(values, at, axis=0).tolist() for name, at in QUANTILES.items()}
    return found | {"count": [len(values)]}


def _png(pixels: np.ndarray) -> bytes:
    import cv2

    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


def _whole(fps: float) -> int | float:
    return int(fps) if fps == int(fps) else fps
