"""The small files of a LeRobot dataset, of layouts 2.0, 2.1 and 3.0 -> where every episode's frames lie.

    v2   meta/episodes.jsonl, tasks.jsonl               one data file and one video per camera for every episode
    v3   meta/episodes/*/*.parquet, meta/tasks.parquet  many episodes to a file; each knows its place in them

Values of state and action lie in parquet, pictures in videos or, as PNG, in parquet too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vla_edge.evaluate.recording import BETWEEN_EPISODES_S
from vla_edge.types import NANOSECONDS, VlaEdgeError

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")


class DatasetError(VlaEdgeError):
    """A LeRobot dataset that is damaged, of another version, or lacks what is asked of it."""


@dataclass(frozen=True)
class Episode:
    """Where one episode lies.

    Attributes:
        index: as in the column `episode_index`. length: frames.
        data: parquet file. videos: feature -> file and s in it at which the episode begins.
        start_ns: its first frame on a timeline that the dataset's episodes share, one after the other.
    """

    index: int
    length: int
    data: Path
    videos: Mapping[str, tuple[Path, float]]
    start_ns: int


@dataclass(frozen=True)
class Description:
    """What a dataset says of itself.

    Attributes:
        fps: frames per second. features: name -> dtype, shape, names. tasks: index -> instruction.
    """

    fps: float
    features: Mapping[str, Mapping]
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...]


def describe(directory: Path) -> Description:
    """Read what a dataset says of itself.

    Raises:
        DatasetError: a file is missing or damaged, or the version is another.
    """
    info = _json(directory / INFO)
    try:
        version, fps, features = info["codebase_version"], float(info["fps"]), info["features"]
        if version not in VERSIONS:
            raise DatasetError(
                f"{directory / INFO} is of codebase_version {version!r}; {', '.join(VERSIONS)} are read: convert the "
                "dataset with LeRobot"
            )
        if not 0 < fps < float("inf"):
            raise DatasetError(f"{directory / INFO} says fps = {fps}; it must be a positive number")
        videos = [name for name, feature in features.items() if feature["dtype"] == "video"]
        rows, tasks = (_third if version == "v3.0" else _second)(directory, info, videos)
        episodes, start_ns = [], 0
        for row in sorted(rows, key=lambda row: row[0]):
            episodes.append(Episode(*row, start_ns=start_ns))
            start_ns += round((row[1] / fps + BETWEEN_EPISODES_S) * NANOSECONDS)
        return Description(fps, features, tasks, tuple(episodes))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        told = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise DatasetError(
            f"the files in {directory / 'meta'} do not describe a dataset: {told}; copy them again"
        ) from error


def read_table(path: Path, columns: list[str] | None = None):
    """A parquet file, or these columns of it, as a `pyarrow.Table`.

    Raises:
        DatasetError: it is missing or damaged, or lacks a column; or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError(
            f"LeRobot datasets are read with pyarrow, which cannot be imported ({error}); run pip install pyarrow"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = set(columns or ()) - set(file.schema_arrow.names)
            if missing:
                raise DatasetError(f"{path} has no column {min(missing)!r}; copy the dataset again")
            return file.read(columns)
    except FileNotFoundError:
        raise DatasetError(f"the dataset lacks {path}; copy it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); copy it again") from error


def _second(directory: Path, info: Mapping, videos: list[str]) -> tuple[list[tuple], dict[int, str]]:
    rows = []
    for entry in _lines(directory / "meta" / "episodes.jsonl"):
        index = entry["episode_index"]
        place = {"episode_index": index, "episode_chunk": index // info["chunks_size"]}
        films = {
            name: (directory / info["video_path"].format(**place, video_key=name), 0.0) for name in videos
        }  # fmt: skip
        rows.append((index, entry["length"], directory / info["data_path"].format(**place), films))
    return rows, {entry["task_index"]: entry["task"] for entry in _lines(directory / "meta" / "tasks.jsonl")}


def _third(directory: Path, info: Mapping, videos: list[str]) -> tuple[list[tuple], dict[int, str]]:
    files = sorted((directory / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DatasetError(f"the dataset {directory} has no meta/episodes/*/*.parquet; copy it again")
    places = ("chunk_index", "file_index")
    columns = ["episode_index", "length", *(f"data/{place}" for place in places)]
    columns += [f"videos/{name}/{entry}" for name in videos for entry in (*places, "from_timestamp")]
    rows = []
    for entry in (entry for file in files for entry in read_table(file, columns).to_pylist()):
        films = {}
        for name in videos:
            place = {key: entry[f"videos/{name}/{key}"] for key in places}
            path = directory / info["video_path"].format(video_key=name, **place)
            films[name] = path, float(entry[f"videos/{name}/from_timestamp"])
        data = directory / info["data_path"].format(**{key: entry[f"data/{key}"] for key in places})
        rows.append((entry["episode_index"], entry["length"], data, films))
    table = read_table(directory / "meta" / "tasks.parquet")
    # the text is the index of a data frame, whose column has had several names
    text = next(name for name in reversed(table.column_names) if name != "task_index")
    return rows, dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))


def _json(path: Path) -> Mapping:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); copy it again") from error


def _lines(path: Path) -> list[Mapping]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); copy it again") from error
