"""A dataset that LeRobot has written is read as LeRobot reads it."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import JOINTS
from lerobot_writer import CAMERA, FPS, LENGTH, NAMES, TASKS, shade, state

from vla_edge.evaluate.lerobot_dataset import LeRobotDataset


@pytest.mark.peers
@pytest.mark.parametrize("video", [True, False], ids=["video", "png"])
def test_what_lerobot_wrote_is_read_as_lerobot_reads_it(tmp_path, video):
    Theirs = pytest.importorskip("lerobot.datasets.lerobot_dataset").LeRobotDataset

    vector = {"dtype": "float32", "shape": (len(NAMES),), "names": list(NAMES)}
    picture = {"dtype": "video" if video else "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": vector, "action": vector, CAMERA: picture}
    root = tmp_path / "set"
    written = Theirs.create("some/set", FPS, features, root, use_videos=video)
    for episode in range(3):
        for index in range(LENGTH):
            values = state(episode)[index]
            written.add_frame(
                {
                    "observation.state": values,
                    "action": values + np.float32(0.01),
                    CAMERA: shade(episode, index),
                    "task": TASKS[episode % 2],
                }
            )
        written.save_episode()
    written.finalize()
    theirs = Theirs("some/set", root=root)
    rows = theirs.hf_dataset
    with LeRobotDataset(root) as opened:
        frames = list(opened.frames(("head",), JOINTS))
    assert len(frames) == len(theirs) == 3 * LENGTH
    for number, frame in enumerate(frames):
        episode, index = divmod(number, LENGTH)
        row = rows[number]
        assert row["episode_index"] == episode
        for told, name in (
            (frame.observation.joints.position, "observation.state"),
            (frame.commanded.positions[0], "action"),
        ):
            np.testing.assert_array_equal(np.float32(told), row[name].numpy()[2::-1])
        assert theirs.meta.tasks.iloc[int(row["task_index"])].name == frame.observation.instruction
        seen = frame.observation.images["head"]
        if not video:
            np.testing.assert_array_equal(seen, np.uint8(row[CAMERA].numpy().transpose(1, 2, 0) * 255 + 0.5))
        differences = [np.abs(np.int32(seen) - shade(episode, other)).mean() for other in range(LENGTH)]
        assert np.argmin(differences) == index and min(differences) < 6
