from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import JOINTS, SPEC

from vla_edge.evaluate.agreement import AgreementTally, compare_normalization, exchanged_joints
from vla_edge.policy.spec import Normalization, NormalizationMode


def motions(frames=40, seed=0):
    """(frames, T, J) rad: each joint swings at a pace of its own."""
    rng = np.random.default_rng(seed)
    time = np.arange(16) * 0.05 + rng.uniform(0, 9, frames)[:, None]
    return 0.3 * np.sin(time[..., None] * np.array([2.0, 3.1, 4.7]))


def judged(ours, expected, spec=SPEC, reference=SPEC, current=np.zeros(3)):
    tally = AgreementTally(spec, reference)
    for a, b in zip(ours, expected):
        tally.add(current, a, b, b + current)
    return tally.result()


def test_concordance_is_lins():
    expected = motions()
    ours = 0.8 * expected + 0.05 + np.random.default_rng(1).normal(0, 0.02, expected.shape)
    found = judged(ours, expected)
    for i, name in enumerate(JOINTS):
        a, b = ours[..., i].ravel(), expected[..., i].ravel()
        lin = 2 * np.cov(a, b, bias=True)[0, 1] / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)
        assert found.concordance[name] == pytest.approx(lin, rel=1e-9)
    assert not found.exchanged


def test_joints_in_another_order_are_found_and_a_cycle_too():
    expected = motions()
    assert judged(expected[..., [1, 0, 2]], expected).exchanged == ((JOINTS[0], JOINTS[1]), (JOINTS[1], JOINTS[0]))
    assert judged(expected[..., [1, 2, 0]], expected).exchanged == tuple(zip(JOINTS, (JOINTS[1], JOINTS[2], JOINTS[0])))


def test_a_bad_joint_is_not_taken_for_another_that_is_good():
    expected = motions()
    expected[..., 1] = expected[..., 0]
    ours = expected.copy()
    ours[..., 1] = np.random.default_rng(2).normal(0, 0.2, ours.shape[:2])
    ours[..., 2] = expected[..., 0]
    # joint 2 moves as joints 0 and 1 should, and joint 0 does so itself
    assert judged(ours, expected).exchanged == ((JOINTS[2], JOINTS[1]),)


def test_joints_that_stand_still_agree_with_nothing_and_are_not_exchanged():
    expected = motions()
    expected[..., 2] = 1e-4 * expected[..., 0]
    found = judged(expected, expected)
    assert np.isnan(found.concordance[JOINTS[2]]) and not found.exchanged
    assert exchanged_joints(np.full((3, 3), np.nan), JOINTS) == ()


def spec_with(mean, std, names=JOINTS):
    return replace(
        SPEC, joint_names=tuple(names),
        state=Normalization(NormalizationMode.MEAN_STD, {"mean": tuple(mean), "std": tuple(std)}),
    )  # fmt: skip


def test_statistics_are_compared_by_name():
    reference = spec_with((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    reordered = spec_with((0.3, 0.1, 0.2), (3.0, 1.0, 2.0), (JOINTS[2], JOINTS[0], JOINTS[1]))
    assert compare_normalization(reordered, reference) == ((), 0.0, "")
    renamed, difference, where = compare_normalization(spec_with((0.1, 0.2, 0.3), (1.0, 2.5, 3.0)), reference)
    assert not renamed and difference == pytest.approx(0.25) and where == f"state scale of {JOINTS[1]}"


def test_names_in_another_order_over_the_same_statistics_are_a_matter_of_order():
    reference = spec_with((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    renamed = spec_with((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (JOINTS[1], JOINTS[0], JOINTS[2]))
    pairs, difference, _ = compare_normalization(renamed, reference)
    assert pairs == ((JOINTS[1], JOINTS[0]), (JOINTS[0], JOINTS[1])) and difference == 0.0


def test_positions_far_outside_the_statistics_are_counted_with_their_joint():
    spec = spec_with((0.0, 0.0, 0.0), (0.1, 0.1, 0.1))
    found = judged(motions(10), motions(10), spec, spec, np.array([0.0, 0.6, 0.4]))
    assert found.state_outside == pytest.approx(1 / 3) and found.state_outside_at == JOINTS[1]
    bounds = Normalization(NormalizationMode.MIN_MAX, {"min": (-1.0,) * 3, "max": (1.0,) * 3})
    spec = replace(SPEC, state=bounds)
    assert judged(motions(10), motions(10), spec, spec, np.array([1.4, 1.6, 0.0])).state_outside == pytest.approx(1 / 3)


def test_a_joint_that_is_not_read_has_no_statistics_to_lie_outside_of():
    named = {"mean": (0.0, 0.0), "std": (0.1, 0.1)}
    spec = replace(SPEC, state=Normalization(NormalizationMode.MEAN_STD, named), state_names=("neck_joint", JOINTS[1]))
    found = judged(motions(10), motions(10), spec, spec, np.array([9.0, 0.6, 0.4]))
    assert found.state_outside == pytest.approx(1 / 3) and found.state_outside_at == JOINTS[1]
    assert found.normalization == 0.0


def test_grippers_are_judged_by_open_and_closed():
    names = ("left_gripper", "elbow", "wrist")
    spec = spec_with((0.5, 0.0, 0.0), (1.0, 1.0, 1.0), names)
    current = np.zeros(3)
    ours, truth = np.zeros((4, 3)), np.zeros((4, 3))
    ours[:, 0], truth[:, 0] = (0.9, 0.6, 0.4, 0.1), (1.0, 0.2, 0.1, np.nan)
    tally = AgreementTally(spec, spec)
    tally.add(current, ours, ours, truth)
    assert tally.result().grippers == {"left_gripper": pytest.approx(2 / 3)}
