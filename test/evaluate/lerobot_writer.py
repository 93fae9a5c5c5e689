"""Small LeRobot datasets of layouts 2.1 and 3.0, whose every number is known; real parquet, real video."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import JOINTS, truth

FPS, EPISODES, LENGTH = 20, 5, 30
TASKS = ("touch the red cube", "touch the blue ball")
NAMES = (*(f"{name}.pos" for name in reversed(JOINTS)), "neck_joint.pos")
CAMERA = "observation.images.head"
CODECS = {"libsvtav1": {"g": "2", "crf": "10"}, "libx264": {"g": "250", "bf": "3", "crf": "8"}}


def shade(episode: int, index: int) -> np.ndarray:
    """(48, 64, 3) uint8, told apart by its brightness after any codec."""
    pixels = np.full((48, 64, 3), 10 + 7 * index, np.uint8)
    pixels[:, :, 2] = 40 * episode
    return pixels


def state(episode: int) -> np.ndarray:
    """(LENGTH, 4) float32 rad, in the order of NAMES."""
    at = truth(np.arange(LENGTH) / FPS + episode)[:, ::-1]
    return np.float32(np.hstack([at, np.full((LENGTH, 1), 0.1)]))


def write_video(path: Path, pictures, codec: str = "libx264") -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, FPS, options=CODECS[codec])
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for pixels in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_dataset(
    root: Path, version: str = "v3.0", dtype: str = "video", codec: str = "libx264", show=shade, states=state
) -> Path:
    """EPISODES episodes of LENGTH frames; the task changes with each. In v3.0, files hold three and two episodes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    third = version == "v3.0"
    (root / "meta").mkdir(parents=True)
    described = {"dtype": "float32", "shape": [4], "names": list(NAMES) if third else {"motors": list(NAMES)}}
    shape = list(show(0, 0).shape)
    features = {
        "observation.state": described,
        "action": described,
        CAMERA: {"dtype": dtype, "shape": shape, "names": ["height", "width", "channels"]},
        **{name: {"dtype": "int64", "shape": [1], "names": None} for name in ("episode_index", "task_index")},
    }
    films = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": films,
    }
    if not third:
        place = "chunk-{episode_chunk:03d}"
        paths = {
            "data_path": f"data/{place}/episode_{{episode_index:06d}}.parquet",
            "video_path": f"videos/{place}/{{video_key}}/episode_{{episode_index:06d}}.mp4",
        }
    info = {"codebase_version": version, "fps": FPS, "chunks_size": 3, "features": features, **paths}
    (root / "meta/info.json").write_text(json.dumps(info))

    def table(episodes):
        columns = {
            "timestamp": np.tile(np.arange(LENGTH, dtype=np.float32) / np.float32(FPS), len(episodes)),
            "frame_index": np.tile(np.arange(LENGTH), len(episodes)),
            "episode_index": np.repeat(episodes, LENGTH),
            "task_index": np.repeat([episode % 2 for episode in episodes], LENGTH),
        }
        for name, more in (("observation.state", 0.0), ("action", 0.01)):
            columns[name] = [row.tolist() for episode in episodes for row in states(episode) + np.float32(more)]
        if dtype == "image":
            columns[CAMERA] = [
                {"bytes": png(show(episode, i)), "path": f"frame-{i:06d}.png"}
                for episode in episodes
                for i in range(LENGTH)
            ]
        types = {name: pa.list_(pa.float32()) for name in ("observation.state", "action")}
        return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})

    groups = [(0, 1, 2), (3, 4)] if third else [(episode,) for episode in range(EPISODES)]
    rows = []
    for number, group in enumerate(groups):
        place = {"chunk_index": 0, "file_index": number, "episode_index": number, "episode_chunk": number // 3}
        data, film = (root / paths[key].format(**place, video_key=CAMERA) for key in ("data_path", "video_path"))
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(group), data, row_group_size=LENGTH)
        if dtype == "video":
            write_video(film, [show(episode, i) for episode in group for i in range(LENGTH)], codec)
        for position, episode in enumerate(group):
            row = {"episode_index": episode, "tasks": [TASKS[episode % 2]], "length": LENGTH}
            if third:
                row |= {"data/chunk_index": 0, "data/file_index": number, "stats/action/mean": [0.0]}
                if dtype == "video":
                    row |= {f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": number}
                    row |= {f"videos/{CAMERA}/from_timestamp": position * LENGTH / FPS}
            rows.append(row)
    if third:
        (root / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
        tasks = pa.table({"task_index": [1, 0], "__index_level_0__": list(reversed(TASKS))})
        pq.write_table(tasks, root / "meta/tasks.parquet")
    else:
        tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
        for name, lines in (("episodes", rows), ("tasks", tasks)):
            (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def png(pixels: np.ndarray) -> bytes:
    import cv2

    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
