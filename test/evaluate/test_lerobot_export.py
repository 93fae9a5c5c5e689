"""A bag becomes a LeRobot dataset that tells the same; test_lerobot_itself.py has LeRobot read it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import JOINTS, START_NS, picture, recording, truth

from vla_edge.cli import main
from vla_edge.evaluate.lerobot_dataset import LeRobotDataset
from vla_edge.evaluate.lerobot_export import export_lerobot
from vla_edge.evaluate.lerobot_files import DatasetError
from vla_edge.evaluate.replay import evaluate_bag
from vla_edge.types import JointCommand

TASKS = ((0.0, "touch the red cube"), (2.0, "touch the blue ball"))


def read(path):
    with LeRobotDataset(path) as opened:
        return list(opened.frames(("head",), JOINTS, horizon_s=0.2))


@pytest.mark.parametrize("video", [True, False], ids=["video", "png"])
def test_a_bag_becomes_episodes_of_the_same_frames(make_bag, tmp_path, video):
    found = export_lerobot(make_bag(items=recording(4.0, TASKS)), tmp_path / "set", 10, joint_names=JOINTS, video=video)
    frames = read(tmp_path / "set")
    # the last of each has no motion of the same instruction after it
    assert (found.episodes, found.frames, found.bridged) == (2, 38, 0) and len(frames) == 38
    assert found.skipped == {"frame after which no motion is known": 2}
    for index, frame in enumerate(frames):
        episode, at = divmod(index, 19)
        seconds = 2.0 * episode + at / 10
        assert frame.observation.instruction == TASKS[episode][1]
        np.testing.assert_allclose(frame.observation.joints.position, truth(seconds), atol=1e-6)
        # no commands: where the joints were a step later
        np.testing.assert_allclose(frame.commanded.positions[0], truth(seconds + 0.1), atol=1e-5)
        seen, shown = frame.observation.images["head"].astype(int), picture(round(200 * seconds)).astype(int)
        assert np.abs(seen - shown).max() == 0 if not video else np.abs(seen - shown).mean() < 12


def test_actions_are_the_commands_where_the_bag_has_them(make_bag, tmp_path):
    items = recording(2.0)
    for k in range(400):
        command = JointCommand(START_NS + k * 5_000_000, JOINTS, truth(k / 200) + 0.05, np.zeros(3), np.zeros(3))
        items.append(("command", command))
    items.sort(key=lambda item: item[1] if isinstance(item[1], int) else item[1].stamp_ns)
    export_lerobot(make_bag(items=items), tmp_path / "set", 10, joint_names=JOINTS, video=False)
    for index, frame in enumerate(read(tmp_path / "set")):
        np.testing.assert_allclose(frame.commanded.positions[0], truth(index / 10 + 0.1) + 0.05, atol=1e-5)


def test_a_few_missing_frames_are_bridged_and_a_pause_ends_the_episode(make_bag, tmp_path):
    def lost(item):
        seconds = (item[1] - START_NS) / 1e9 if item[0] == "image" else -1
        return 0.95 < seconds < 1.18 or 2.45 < seconds < 3.05

    items = [item for item in recording(5.0) if not lost(item)]
    found = export_lerobot(make_bag(items=items), tmp_path / "set", 10, joint_names=JOINTS, video=False)
    assert found.episodes == 2 and found.bridged == 2
    frames = read(tmp_path / "set")
    np.testing.assert_array_equal(frames[10].observation.images["head"], frames[9].observation.images["head"])
    np.testing.assert_allclose(frames[10].observation.joints.position, truth(1.0), atol=1e-5)
    # every row of an episode is a step after the one before
    np.testing.assert_allclose(frames[12].observation.joints.position, truth(1.2), atol=1e-5)


def test_it_says_what_it_is_and_its_statistics_are_those_of_its_rows(make_bag, tmp_path):
    export_lerobot(make_bag(items=recording(4.0, TASKS)), tmp_path / "set", 10, joint_names=JOINTS, video=False)
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"], info["total_tasks"]) == ("v3.0", 10, 38, 2)
    assert info["features"]["observation.state"]["names"] == list(JOINTS)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    states = np.array([frame.observation.joints.position for frame in read(tmp_path / "set")])
    np.testing.assert_allclose(stats["observation.state"]["mean"], states.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["observation.state"]["std"], states.std(0), atol=1e-6)
    np.testing.assert_allclose(stats["observation.state"]["q99"], np.quantile(states, 0.99, axis=0), atol=1e-6)
    assert np.shape(stats["observation.images.head"]["mean"]) == (3, 1, 1)
    assert stats["observation.images.head"]["max"][2] == [[1.0]]


def test_an_engine_is_evaluated_on_the_dataset_as_on_the_bag(make_bag, tmp_path, oracle):
    bag = make_bag(items=recording(6.0))
    export_lerobot(bag, tmp_path / "set", 20, joint_names=JOINTS, video=False)

    class Shifted:
        """Knows the dataset's clock, which begins at 0."""

        spec = oracle().spec

        def infer(self, observation, seed=0, noise=None):
            from dataclasses import replace

            at = observation.stamp_ns
            found = oracle(offset=0.01).infer(replace(observation, stamp_ns=at + START_NS))
            return replace(found, chunk=replace(found.chunk, stamp_ns=at))

    ours, theirs = evaluate_bag(tmp_path / "set", Shifted()), evaluate_bag(bag, oracle(offset=0.01))
    assert ours.action_mae_rad == pytest.approx(theirs.action_mae_rad, rel=1e-3) and ours.frames == theirs.frames


def test_nothing_is_overwritten_and_nothing_half_written_is_left(make_bag, tmp_path):
    (tmp_path / "there").mkdir()
    bag = make_bag(items=recording(1.0))
    with pytest.raises(DatasetError, match="never overwritten"):
        export_lerobot(bag, tmp_path / "there", 10)
    items = recording(1.0)
    sizes = [(*x[:3], x[3][:24]) if x[0] == "image" and i > 150 else x for i, x in enumerate(items)]
    with pytest.raises(DatasetError, match="camera head changes from"):
        export_lerobot(make_bag("sizes", sizes), tmp_path / "set", 10)
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".set.*"))


def test_the_command_converts(make_bag, tmp_path, capsys):
    bag = make_bag(items=recording(2.0))
    assert main(["convert", str(bag), str(tmp_path / "set"), "--fps", "10", "--png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 19
    with LeRobotDataset(tmp_path / "set") as opened:
        assert set(opened.joint_names()) == {*JOINTS, "neck_joint"}
