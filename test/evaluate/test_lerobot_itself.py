"""A dataset that LeRobot has written is read as LeRobot reads it."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import JOINTS, picture, recording, truth
from lerobot_writer import CAMERA, FPS, LENGTH, NAMES, TASKS, shade, state

from vla_edge.evaluate.lerobot_dataset import LeRobotDataset
from vla_edge.evaluate.lerobot_export import export_lerobot


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


@pytest.mark.peers
@pytest.mark.parametrize("video", [True, False], ids=["video", "png"])
def test_lerobot_reads_what_a_bag_was_converted_to(make_bag, tmp_path, video):
    Theirs = pytest.importorskip("lerobot.datasets.lerobot_dataset").LeRobotDataset

    tasks = ((0.0, "touch the red cube"), (2.0, "touch the blue ball"))
    root = tmp_path / "set"
    export_lerobot(make_bag(items=recording(4.0, tasks)), root, 10, joint_names=JOINTS, video=video)
    # four targets from each observation on, as a policy is trained
    theirs = Theirs("some/set", root=root, delta_timestamps={"action": [0.0, 0.1, 0.2, 0.3]}, video_backend="pyav")
    assert (theirs.num_episodes, len(theirs), theirs.fps) == (2, 38, 10)
    stats = theirs.meta.stats
    assert stats["action"]["mean"].shape == (3,) and stats[CAMERA]["std"].shape == (3, 1, 1)
    for index in (0, 7, 18, 19, 30):
        item, (episode, at) = theirs[index], divmod(index, 19)
        seconds = 2.0 * episode + at / 10
        assert item["task"] == tasks[episode][1] and int(item["episode_index"]) == episode
        np.testing.assert_allclose(item["observation.state"], truth(seconds), atol=1e-6)
        known = ~item["action_is_pad"].numpy()
        steps = truth(seconds + np.array([0.1, 0.2, 0.3, 0.4]))
        np.testing.assert_allclose(item["action"].numpy()[known], steps[known], atol=1e-5)
        assert known.sum() == min(4, 19 - at)
        seen = item["observation.images.head"].numpy().transpose(1, 2, 0) * 255
        shown = picture(round(200 * seconds)).astype(float)
        assert np.abs(seen - shown).max() < 1 if not video else np.abs(seen - shown).mean() < 12
