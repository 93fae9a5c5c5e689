"""Each fault does to sensors what it says, and nothing when it is off."""

from __future__ import annotations

import numpy as np
import pytest

from vla_edge.sim.faults import FaultError, Faults, FaultyCamera, FaultyJoints, parse_faults
from vla_edge.types import JointState

MS = 1_000_000


def measured(ms: float) -> JointState:
    return JointState(round(ms * MS), ("a", "b"), [ms, -ms])


def joints(faults: Faults, until_ms: int = 100) -> list[tuple[int, JointState]]:
    """(arrival ms, joint state) at 500 Hz."""
    out, now = [], 0
    faulty = FaultyJoints(lambda state: out.append((now, state)))
    for now in range(0, until_ms, 2):
        faulty.put(measured(now), now * MS, faults)
    return out


def camera(*stretches: tuple[Faults, int]) -> list[tuple[int, int, object]]:
    """(arrival ms, stamp ms, what is seen) at 20 Hz; what is seen is the time it was seen."""
    out, begin, now = [], 0, 0
    faulty = FaultyCamera(lambda stamp, seen: out.append((now, stamp // MS, seen)))
    for faults, until in stretches:
        for now in range(begin, until):
            faulty.tick(now * MS)
            if now % 50 == 0:
                faulty.put(now * MS, now, now * MS, faults)
        begin = until
    return out


def test_without_faults_everything_passes_at_once_and_unchanged():
    for arrival, state in joints(Faults()):
        assert state.stamp_ns == arrival * MS and list(state.position) == [arrival, -arrival]
    assert camera((Faults(), 300)) == [(at, at, at) for at in range(0, 300, 50)]


def test_joint_states_are_late_with_their_stamps():
    found = joints(Faults(joint_delay=0.03))
    assert {arrival - state.stamp_ns // MS for arrival, state in found} == {30} and len(found) == 35


def test_joint_states_are_noisy_lost_frozen_or_not_numbers():
    noisy = np.array([state.position[0] - at for at, state in joints(Faults(joint_noise=0.01), 4000)])
    assert 0.009 < noisy.std() < 0.011
    assert 0.25 < len(joints(Faults(joint_drop=0.7), 4000)) / 2000 < 0.35
    frozen = joints(Faults(joint_freeze=True))
    assert {tuple(state.position) for _, state in frozen} == {(0.0, 0.0)}
    assert [state.stamp_ns for _, state in frozen] == [at * MS for at, _ in frozen]
    position = joints(Faults(joint_nan=True))[-1][1].position
    assert np.isnan(position[0]) and np.isfinite(position[1])


def test_images_are_late_frozen_under_new_stamps_or_gone():
    assert camera((Faults(image_delay=0.12), 300)) == [(at + 120, at, at) for at in range(0, 151, 50)]
    frozen = camera((Faults(), 100), (Faults(image_freeze=True), 300), (Faults(), 400))
    assert [(stamp, seen) for _, stamp, seen in frozen] == [
        (0, 0), (50, 50), (100, 100), (150, 100), (200, 100), (250, 100), (300, 300), (350, 350)
    ]  # fmt: skip
    assert camera((Faults(image_stop=True), 300)) == []


def test_images_are_overtaken_and_none_is_lost():
    stamps = [stamp for _, stamp, _ in camera((Faults(image_shuffle=0.5), 2000))]
    assert stamps != sorted(stamps) and len(set(stamps)) == len(stamps) >= 39
    assert max(np.abs(np.array(stamps) - np.sort(stamps))) == 50


def test_faults_are_read_from_yaml():
    assert parse_faults("") == Faults()
    assert parse_faults("joint_noise: 0.01") == Faults(joint_noise=0.01)
    assert parse_faults("{torque: -3, image_freeze: true}") == Faults(torque=-3, image_freeze=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("joint_nois: 1", "did you mean 'joint_noise'"),
        ("joint_drop: 1.5", "joint_drop is 1.5; it must be a number from 0 to 1"),
        ("joint_delay: true", "joint_delay is True"),
        ("joint_noise: .nan", "joint_noise is nan"),
        ("image_freeze: 1", "image_freeze is 1; it must be true or false"),
        ("torque_joint: tail", "torque_joint is 'tail'; it must be one of a, b"),
        ("[1]", "are not understood"),
        ("a: b: c", "are not understood"),
    ],
)
def test_a_fault_that_means_nothing_is_refused(text, says):
    with pytest.raises(FaultError, match=says):
        parse_faults(text, ("a", "b"))
