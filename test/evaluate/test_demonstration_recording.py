"""Demonstrations give the network the pictures they hold, whole episodes apart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import HEAD, JOINTS, SPEC

from vla_edge.compress.calibrate import load_calibration
from vla_edge.evaluate.recording import open_recording
from vla_edge.policy.preprocess import ObservationError, Preprocessor, as_delivered
from vla_edge.sim.demonstrations import DemonstrationError

EPISODES, LENGTH = 8, 6
# every third pixel of what the camera's crop holds
CAMERA = replace(HEAD, height=16, width=16)
POLICY = replace(SPEC, cameras=(CAMERA,))


@pytest.fixture
def recorded(tmp_path):
    """Two shards of four episodes each; joints in another order than the policy's."""
    path = tmp_path / "shown"
    path.mkdir()
    said = {"joint_names": [*reversed(JOINTS), "neck_joint"], "dt": 0.05, "chunk": 4}
    (path / "recording.json").write_text(json.dumps(said))
    rng = np.random.default_rng(0)
    for shard in range(2):
        episodes = np.repeat(np.arange(4) + 4 * shard, LENGTH)
        np.savez_compressed(
            path / f"shard-{shard:04d}.npz",
            images=rng.integers(0, 256, (len(episodes), 16, 16, 3), dtype=np.uint8),
            state=rng.normal(size=(len(episodes), 4)).astype(np.float32),
            instruction=np.array([f"touch cube {episode % 2}" for episode in episodes]),
            episode=1_000_000 + episodes,
            step=np.tile(np.arange(LENGTH), 4),
        )
    return path


def test_the_network_sees_the_very_pictures_and_joints_by_name(recorded):
    with open_recording(recorded) as opened:
        seen = [moment.read() for moment in opened.moments(POLICY)]
    assert len(seen) == EPISODES * LENGTH
    shards = [np.load(path) for path in sorted(recorded.glob("*.npz"))]
    pictures, states = (np.concatenate([shard[name] for shard in shards]) for name in ("images", "state"))
    preprocess = Preprocessor(POLICY, None)
    for observation, picture, state in zip(seen, pictures, states):
        assert observation.images["head"].shape == (48, 64, 3)
        shown = preprocess.image(observation, CAMERA)[0]
        np.testing.assert_array_equal(np.rint((shown + 1) * 127.5), picture.transpose(2, 0, 1))
        np.testing.assert_array_equal(observation.joints.position, np.float64(state[2::-1]))
    stamps = np.array([observation.stamp_ns for observation in seen]).reshape(EPISODES, LENGTH)
    assert (np.diff(stamps, axis=1) == 50_000_000).all() and (stamps[1:, 0] - stamps[:-1, -1] > 2e9).all()


def test_calibration_keeps_whole_demonstrations_apart(recorded):
    data = load_calibration(recorded, POLICY, frames=100, held_out=100)
    assert (len(data.observations), len(data.held_out)) == (6 * LENGTH, 2 * LENGTH)
    assert {o.instruction for o in data.held_out} == {"touch cube 1"}
    assert load_calibration(recorded, POLICY).identity == data.identity


def test_what_the_policy_needs_and_demonstrations_lack_is_named(recorded):
    with pytest.raises(DemonstrationError, match="takes 1 cameras and left_toe_joint"):
        load_calibration(recorded, replace(POLICY, joint_names=(*JOINTS, "left_toe_joint")))
    with pytest.raises(DemonstrationError, match="takes 2 cameras"):
        load_calibration(recorded, replace(POLICY, cameras=(CAMERA, replace(CAMERA, name="wrist"))))
    with pytest.raises(ObservationError, match="stored as 16x16 pixels"):
        load_calibration(recorded, SPEC)


def test_a_damaged_recording_is_named(recorded):
    shard = recorded / "shard-0001.npz"
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(DemonstrationError, match="shard-0001.npz cannot be read"):
        load_calibration(recorded, POLICY)
    (recorded / "recording.json").unlink()
    with pytest.raises(DemonstrationError, match="recording.json"):
        load_calibration(recorded, POLICY)


def test_a_picture_of_the_cameras_own_size_is_left_alone():
    picture = np.zeros((48, 64, 3), np.uint8)
    assert as_delivered(picture, CAMERA) is picture
