"""LeRobot datasets of both layouts give the observations that were written; what is wrong with one is named."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import JOINTS, SPEC

pytest.importorskip("pyarrow")
pytest.importorskip("av")

import pyarrow.parquet as pq  # noqa: E402
from lerobot_writer import CAMERA, EPISODES, FPS, LENGTH, TASKS, shade, state, write_dataset, write_video  # noqa: E402

from vla_edge.compress.calibrate import CalibrationError, load_calibration  # noqa: E402
from vla_edge.evaluate.lerobot_dataset import DatasetError, LeRobotDataset  # noqa: E402
from vla_edge.evaluate.recording import open_recording  # noqa: E402
from vla_edge.policy.preprocess import ObservationError  # noqa: E402
from vla_edge.types import VlaEdgeError  # noqa: E402

STORED = {
    "v2.1 h264": {"version": "v2.1"},
    "v2.0 png": {"version": "v2.0", "dtype": "image"},
    "v3.0 av1": {"codec": "libsvtav1"},
    "v3.0 png": {"dtype": "image"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The directory of a v3.0 dataset with videos; not to be changed."""
    return write_dataset(tmp_path_factory.mktemp("datasets") / "set")


def told_apart(picture, episode: int) -> int:
    """Which frame of the episode a picture shows, whatever the codec made of it."""
    differences = [np.abs(np.int32(picture) - shade(episode, index)).mean() for index in range(LENGTH)]
    assert min(differences) < 3
    return int(np.argmin(differences))


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_every_layout_gives_what_was_written(tmp_path, stored):
    with LeRobotDataset(write_dataset(tmp_path / "set", **stored)) as opened:
        assert opened.cameras() == ("head",) and opened.joint_names() == (*reversed(JOINTS), "neck_joint")
        assert opened.duration_s == EPISODES * LENGTH / FPS
        frames = list(opened.frames(("head",), JOINTS))
    assert len(frames) == EPISODES * LENGTH and not opened.skipped
    for number, frame in enumerate(frames):
        episode, index = divmod(number, LENGTH)
        seen = frame.observation
        assert seen.instruction == TASKS[episode % 2] and seen.joints.names == JOINTS
        np.testing.assert_array_equal(seen.joints.position, np.float64(state(episode)[index, 2::-1]))
        assert told_apart(seen.images["head"], episode) == index
        if stored.get("dtype") == "image":
            np.testing.assert_array_equal(seen.images["head"], shade(episode, index))


def test_stamps_tell_episodes_apart_and_follow_the_clock_inside(dataset):
    with LeRobotDataset(dataset) as opened:
        stamps = np.array([moment.stamp_ns for moment in opened.moments(SPEC)]).reshape(EPISODES, LENGTH)
    np.testing.assert_allclose(np.diff(stamps, axis=1), 1e9 / FPS, atol=1000)
    assert (stamps[1:, 0] - stamps[:-1, -1] > 2e9).all()


def test_a_policy_of_several_observations_sees_the_rows_before_but_not_of_another_episode(dataset):
    several = replace(SPEC, observation_steps=2, dt=2 / FPS)
    with LeRobotDataset(dataset) as opened:
        frames = list(opened.frames(("head",), JOINTS, lags=several.lags))
    for number, frame in enumerate(frames):
        episode, index = divmod(number, LENGTH)
        (before,) = frame.observation.before
        wanted = max(index - 2, 0) if index != 1 else (0, 1)
        assert told_apart(before.images["head"], episode) in np.atleast_1d(wanted)
        assert before.stamp_ns <= frame.observation.stamp_ns


def test_frames_carry_the_motion_that_followed_and_what_was_told(dataset):
    with LeRobotDataset(dataset) as opened:
        frame = list(opened.frames(("head",), JOINTS, horizon_s=0.2))[LENGTH + 3]
    assert len(frame.measured.stamps_ns) >= 5
    np.testing.assert_allclose(frame.measured.positions[:5], state(1)[3:8, 2::-1], rtol=1e-7)
    np.testing.assert_allclose(frame.commanded.positions[:5], state(1)[3:8, 2::-1] + 0.01, atol=1e-6)


def test_the_rate_takes_frames_on_its_ticks(dataset):
    with LeRobotDataset(dataset) as opened:
        stamps = [frame.observation.stamp_ns for frame in opened.frames(("head",), JOINTS, rate_hz=5)]
    assert len(stamps) == EPISODES * 8
    np.testing.assert_allclose(np.diff(stamps[:8]), 2e8, atol=1000)


def test_calibration_samples_it_as_it_samples_a_bag_and_decodes_no_more(dataset, monkeypatch):
    from vla_edge.evaluate import lerobot_dataset

    decoded = []
    at = lerobot_dataset.Video.at
    monkeypatch.setattr(lerobot_dataset.Video, "at", lambda *given: decoded.append(given[1]) or at(*given))
    data = load_calibration(dataset, SPEC, frames=8, held_out=4)
    assert (len(data.observations), len(data.held_out), data.source) == (8, 4, "set")
    assert len(decoded) == 12
    # every fourth episode is held out
    assert {o.instruction for o in data.held_out} == {TASKS[1]}
    held = {int(np.abs(state(3)[:, 2] - o.joints.position[0]).argmin()) for o in data.held_out}
    assert len(held) == 4 and max(held) > LENGTH / 2 > min(held)
    for observation in data.held_out:
        index = int(np.abs(state(3)[:, 2] - observation.joints.position[0]).argmin())
        assert told_apart(observation.images["head"], 3) == index
    again = load_calibration(str(dataset), SPEC, frames=8, held_out=4)
    assert again.identity == data.identity
    assert load_calibration(dataset, SPEC, frames=9, held_out=4).identity != data.identity


def test_cropped_pictures_are_put_back_into_the_cameras_frame(tmp_path):
    path = write_dataset(tmp_path / "set", dtype="image", show=lambda e, i: np.ascontiguousarray(shade(e, i)[:, :48]))
    with open_recording(path) as opened:
        seen = next(opened.moments(SPEC)).read()
    assert seen.images["head"].shape == (48, 64, 3)
    np.testing.assert_array_equal(seen.images["head"][:, 8:56], shade(0, 0)[:, :48])
    path = write_dataset(tmp_path / "other", dtype="image", show=lambda e, i: np.ascontiguousarray(shade(e, i)[:20]))
    with open_recording(path) as opened, pytest.raises(ObservationError, match="stored as 64x20 pixels"):
        next(opened.moments(SPEC)).read()


def test_frames_with_nothing_to_see_are_counted(tmp_path):
    def states(episode):
        values = state(episode)
        values[3:5, 0] = np.nan
        return values

    with LeRobotDataset(write_dataset(tmp_path / "set", states=states)) as opened:
        assert len(list(opened.moments(SPEC))) == EPISODES * (LENGTH - 2)
        assert opened.skipped == {"frame without finite joint positions": 2 * EPISODES}
    with pytest.raises(CalibrationError, match="set holds 0 usable observations"):
        write_dataset(tmp_path / "nan/set", states=lambda episode: state(episode) * np.nan)
        load_calibration(tmp_path / "nan/set", SPEC)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(SPEC, joint_names=(*JOINTS[:2], "left_toe_joint")), "has no joint left_toe_joint.*waist_yaw_joint"),
        (replace(SPEC, cameras=(replace(SPEC.cameras[0], name="wrist"),)), "has no camera wrist.* it has head"),
    ],
    ids=["joint", "camera"],
)
def test_what_the_policy_needs_and_the_dataset_lacks_is_named(dataset, spec, message):
    with pytest.raises(DatasetError, match=message):
        load_calibration(dataset, spec)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unname(path):
    info = json.loads(path.read_text())
    info["features"]["observation.state"]["names"] = None
    path.write_text(json.dumps(info))


def cut(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def shorten(path):
    write_video(path, [shade(0, i) for i in range(LENGTH)])


def without(path, column):
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([column]), path)


DATA, FILM = "data/chunk-000/file-000.parquet", f"videos/{CAMERA}/chunk-000/file-000.mp4"
DAMAGES = {
    "another version": (
        lambda d: edit(d / "meta/info.json", codebase_version="v1.6"),
        "codebase_version 'v1.6'.*convert",
    ),
    "no rate": (lambda d: edit(d / "meta/info.json", fps=0), "fps = 0"),
    "nothing in it": (lambda d: (d / "meta/info.json").write_text("{}"), "no entry 'codebase_version'"),
    "no JSON": (lambda d: cut(d / "meta/info.json"), "info.json cannot be read"),
    "joints without names": (lambda d: unname(d / "meta/info.json"), "does not name the joints"),
    "no episodes": (lambda d: (d / "meta/episodes/chunk-000/file-000.parquet").unlink(), "has no meta/episodes"),
    "damaged parquet": (lambda d: cut(d / DATA), "file-000.parquet cannot be read"),
    "missing parquet": (lambda d: (d / DATA).unlink(), "lacks .*file-000.parquet"),
    "missing column": (lambda d: without(d / DATA, "timestamp"), "has no column 'timestamp'"),
    "rows of fewer episodes": (
        lambda d: pq.write_table(pq.read_table(d / DATA)[:40], d / DATA),
        "10 rows of episode 1",
    ),
    "damaged video": (lambda d: cut(d / FILM), "file-000.mp4 cannot be read"),
    "missing video": (lambda d: (d / FILM).unlink(), "lacks .*file-000.mp4"),
    "shorter video": (lambda d: shorten(d / FILM), r"has no frame at \d\.\d+ s"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(tmp_path, damage, message):
    path = write_dataset(tmp_path / "set")
    damage(path)
    with pytest.raises(VlaEdgeError, match=message) as raised:
        load_calibration(path, SPEC)
    assert isinstance(raised.value, DatasetError)


@pytest.mark.parametrize(("package", "message"), [("pyarrow", "pip install pyarrow"), ("av", "pip install av")])
def test_a_package_that_is_not_installed_is_named(dataset, monkeypatch, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DatasetError, match=message):
        load_calibration(dataset, SPEC)


def test_a_damaged_picture_in_parquet_is_named(tmp_path):
    path = write_dataset(tmp_path / "set", dtype="image")
    table = pq.read_table(path / DATA)
    rows = [{"bytes": b"no picture", "path": None}] * len(table)
    import pyarrow as pa

    pq.write_table(table.set_column(table.column_names.index(CAMERA), CAMERA, pa.array(rows)), path / DATA)
    with pytest.raises(DatasetError, match="row 0 of .* has no picture observation.images.head"):
        load_calibration(path, SPEC)
