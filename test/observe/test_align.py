"""Streams become one observation, or the reason why not."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from vla_edge.observe.align import Aligner, Frame, Readiness
from vla_edge.observe.image import ImageDataError
from vla_edge.types import JointState

MS = 1_000_000


def frame(stamp_ms: float, arrival_ms: float | None = None, value: int = 0) -> Frame:
    arrival = stamp_ms if arrival_ms is None else arrival_ms
    return Frame(round(stamp_ms * MS), round(arrival * MS), lambda: np.full((2, 2, 3), value, np.uint8))


def joints(stamp_ms: float, position: float = 0.0) -> JointState:
    return JointState(round(stamp_ms * MS), ("a",), [position])


def filled(cameras=("head",), **options) -> Aligner:
    aligner = Aligner(cameras, **options)
    for camera in cameras:
        aligner.add_frame(camera, frame(100, 110, value=1))
    for at in (80, 90, 100, 105):
        aligner.add_joints(joints(at, at), (at + 1) * MS)
    aligner.set_instruction("go")
    return aligner


def test_an_observation_speaks_of_the_moment_of_its_newest_frame():
    found = filled().align(120 * MS)
    assert found.readiness is Readiness.READY
    assert found.observation.stamp_ns == 100 * MS and found.arrival_ns == 110 * MS
    # The joints of a later moment are there, and are not what the camera saw.
    assert found.observation.joints.position[0] == 100


@pytest.mark.parametrize("missing", ("camera head", "joint states", "an instruction"))
def test_what_has_never_come_is_waited_for_by_name(missing):
    aligner = Aligner(["head"])
    if missing != "camera head":
        aligner.add_frame("head", frame(100))
    if missing != "joint states":
        aligner.add_joints(joints(100), 100 * MS)
    if missing != "an instruction":
        aligner.set_instruction("go")
    found = aligner.align(101 * MS)
    assert found.readiness is Readiness.WAITING and found.reason == f"waiting for {missing}"
    assert found.observation is None


def test_a_silent_source_is_stale_by_its_arrival_whatever_its_stamps_say():
    aligner = filled(max_age=0.5)
    aligner.add_joints(joints(10_000), 106 * MS)
    found = aligner.align(1000 * MS)
    assert found.readiness is Readiness.STALE
    assert "camera head silent for 0.9 s" in found.reason and "joint states silent for 0.9 s" in found.reason


def test_joints_too_far_from_the_frame_are_not_used_with_it():
    aligner = filled(max_skew=0.05)
    aligner.add_frame("head", frame(200, 200))
    found = aligner.align(201 * MS)
    assert found.readiness is Readiness.STALE and "no joint state within 50 ms" in found.reason


def test_a_further_camera_gives_its_newest_frame_not_newer_than_the_first():
    aligner = filled(("head", "wrist"))
    aligner.add_frame("wrist", frame(95, 111, value=5))
    aligner = Aligner(("head", "wrist"), max_skew=0.05)
    aligner.add_joints(joints(100), 100 * MS)
    aligner.set_instruction("go")
    for stamp, value in ((90, 5), (99, 6), (101, 7)):
        aligner.add_frame("wrist", frame(stamp, value=value))
    aligner.add_frame("head", frame(100))
    assert aligner.align(102 * MS).observation.images["wrist"][0, 0, 0] == 6
    aligner.add_frame("head", frame(180))
    aligner.add_joints(joints(180), 180 * MS)
    found = aligner.align(181 * MS)
    assert found.readiness is Readiness.STALE and "wrist" in found.reason


def test_a_clock_set_back_does_not_leave_frames_of_the_future():
    aligner = filled(max_age=0.05)
    assert aligner.add_frame("head", frame(10, 120, value=9))
    aligner.add_joints(joints(9, 0.5), 121 * MS)
    found = aligner.align(122 * MS)
    assert found.observation.stamp_ns == 10 * MS and found.observation.joints.position[0] == 0.5


def test_what_was_overtaken_on_its_way_paces_nothing_and_hides_nothing_newer():
    aligner = filled(("head", "wrist"), max_skew=0.03)
    assert not aligner.add_frame("head", frame(60, 112, value=9))
    aligner.add_joints(joints(70, 0.5), 113 * MS)
    found = aligner.align(114 * MS).observation
    assert found.stamp_ns == 100 * MS and found.images["head"][0, 0, 0] == 1 and found.joints.position[0] == 100
    assert aligner.counts == {"late camera head": 1, "late joint states": 1}
    # A further camera's late frame is the nearest to the next frame of the first.
    aligner.add_frame("wrist", frame(140, 130, value=7))
    aligner.add_frame("wrist", frame(118, 131, value=6))
    aligner.add_frame("head", frame(120, 132))
    aligner.add_joints(joints(120), 132 * MS)
    assert aligner.align(133 * MS).observation.images["wrist"][0, 0, 0] == 6


def test_a_camera_that_sends_its_last_frame_again_and_again_goes_silent():
    aligner = filled(max_age=0.2)
    for at in range(120, 500, 20):
        assert not aligner.add_frame("head", frame(100, at))
        aligner.add_joints(joints(at), at * MS)
    found = aligner.align(500 * MS)
    assert found.readiness is Readiness.STALE and found.reason == "camera head silent for 0.4 s"
    assert aligner.counts["repeated camera head"] == 19


def test_a_camera_that_shows_one_picture_under_new_stamps_is_frozen_where_that_is_asked_for():
    for frozen_after, ready in ((0.0, Readiness.READY), (0.3, Readiness.STALE)):
        aligner = filled(frozen_after=frozen_after)
        for at in range(120, 620, 20):
            picture = frame(at)
            aligner.add_frame("head", Frame(picture.stamp_ns, picture.arrival_ns, picture.decode, fingerprint=5))
            aligner.add_joints(joints(at), at * MS)
        found = aligner.align(610 * MS)
        assert found.readiness is ready
    assert found.reason == "camera head shows one picture since 0.5 s"
    aligner.add_frame("head", Frame(620 * MS, 620 * MS, picture.decode, fingerprint=6))
    assert aligner.align(621 * MS).readiness is Readiness.READY


def test_frames_missing_from_a_cameras_rhythm_are_counted():
    aligner = Aligner(["head"])
    for at in (0, 33, 67, 100, 133, 167, 200, 233, 267, 367, 400):
        aligner.add_frame("head", frame(at))
    assert aligner.counts == {"missed camera head": 2}


def test_ages_are_by_arrival_and_of_what_has_come():
    aligner = Aligner(["head", "wrist"])
    aligner.add_frame("head", frame(5, 100))
    assert aligner.ages(350 * MS) == {"camera head": pytest.approx(0.25)}


def test_a_picture_that_does_not_decode_is_counted_and_nothing_is_observed():
    def broken():
        raise ImageDataError("no picture")

    aligner = filled()
    aligner.add_frame("head", Frame(101 * MS, 111 * MS, broken))
    found = aligner.align(112 * MS)
    assert found.readiness is Readiness.STALE and found.observation is None
    assert aligner.rejected.total() == 1


def test_slow_pictures_of_several_cameras_are_decoded_at_once():
    """Each waits for the other to have begun."""
    together, aligner = threading.Barrier(2, timeout=5.0), filled(("head", "wrist"))

    def decoded(value: int):
        def decode():
            together.wait()
            return np.full((2, 2, 3), value, np.uint8)

        return decode

    for camera, value in (("head", 7), ("wrist", 8)):
        assert aligner.add_frame(camera, Frame(104 * MS, 115 * MS, decoded(value), slow=True))
    images = aligner.align(120 * MS).observation.images
    assert {camera: int(image[0, 0, 0]) for camera, image in images.items()} == {"head": 7, "wrist": 8}


def test_a_slow_picture_that_does_not_decode_is_counted_too():
    aligner = filled(("head", "wrist"))

    def broken():
        raise ImageDataError("no picture")

    aligner.add_frame("head", frame(101, 111))
    aligner.add_frame("wrist", Frame(101 * MS, 115 * MS, broken, slow=True))
    assert aligner.align(120 * MS).readiness is Readiness.STALE
    assert aligner.rejected == {"no picture": 1}


def test_a_withdrawn_instruction_ends_observation():
    aligner = filled()
    aligner.set_instruction(None)
    assert aligner.align(112 * MS).readiness is Readiness.WAITING


def test_nothing_of_before_is_seen_after_forgetting():
    aligner = filled()
    aligner.forget()
    assert aligner.align(112 * MS).reason == "waiting for camera head, joint states"


def test_streams_and_the_policy_may_use_it_at_once():
    aligner, failures, end = filled(), [], threading.Event()

    def feed():
        stamp = 106
        while not end.is_set():
            stamp += 1
            aligner.add_joints(joints(stamp, stamp), stamp * MS)
            aligner.add_frame("head", frame(stamp, value=1))

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        for _ in range(2000):
            observation = aligner.align(0).observation
            # Between joint state and frame of the same moment, the joints are one step ahead, never behind.
            if observation.joints.position[0] != observation.stamp_ns / MS:
                failures.append(observation)
    finally:
        end.set()
        thread.join()
    assert not failures


def test_a_policy_of_several_observations_sees_those_that_were_made_that_long_before():
    aligner = Aligner(["head", "wrist"], lags=(0.2, 0.1))
    for at in range(0, 401, 33):
        aligner.add_joints(joints(at, at), at * MS)
        aligner.add_frame("wrist", frame(at - 3, value=at // 33 + 100))
        aligner.add_frame("head", frame(at, value=at // 33))
    aligner.set_instruction("go")
    seen = aligner.align(401 * MS).observation
    assert seen.stamp_ns == 396 * MS and [each.stamp_ns for each in seen.before] == [198 * MS, 297 * MS]
    for each in (*seen.before, seen):
        number = each.stamp_ns // MS // 33
        assert each.images["head"][0, 0, 0] == number and each.images["wrist"][0, 0, 0] == number + 100
        assert each.joints.position[0] == each.stamp_ns // MS
    assert [each.stamp_ns for each in seen.last(3)] == [198 * MS, 297 * MS, 396 * MS]


def test_of_a_policy_of_several_observations_the_first_stands_for_those_that_never_were():
    seen = filled(lags=(0.1,)).align(120 * MS).observation
    assert [each.stamp_ns for each in seen.last(3)] == [100 * MS] * 3


def test_a_policy_without_language_waits_for_no_instruction_until_one_is_withdrawn():
    aligner = Aligner(["head"], instructed=False)
    aligner.add_frame("head", frame(100))
    aligner.add_joints(joints(100), 100 * MS)
    assert aligner.align(101 * MS).observation.instruction == ""
    aligner.set_instruction(None)
    assert aligner.align(101 * MS).reason == "waiting for an instruction"
