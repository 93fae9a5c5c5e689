"""Each inference policy does what its paper says, on plans that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fake_engine import DT, NAMES, ROWS, ns, observation, ramp

from vla_edge.serve.inference_policy import InferencePolicyError, Situation
from vla_edge.serve.plan import positions_at, row_stamps
from vla_edge.serve.policies import POLICIES, make_policy
from vla_edge.serve.policies.real_time_chunking import soft_mask
from vla_edge.serve.policies.synchronous import Synchronous
from vla_edge.serve.policies.temporal_ensembling import TemporalEnsembling
from vla_edge.types import ActionChunk

RUNNING = ActionChunk(ns(1.0), NAMES, ramp(observation(1.0)), DT)


def situation(seconds: float = 1.4, delay: float = 0.23, same: bool = True, running=RUNNING, recent=()) -> Situation:
    where = positions_at(RUNNING, np.array([ns(seconds)]))[0]
    return Situation(observation(seconds, where), running, recent, same, delay)


def answer(given: Situation, offset: float = 0.05) -> ActionChunk:
    """What an engine that plans slower and elsewhere says."""
    return ActionChunk(given.observation.stamp_ns, NAMES, ramp(given.observation, 0.3, offset), DT)


@pytest.mark.parametrize("name", POLICIES)
def test_a_chunk_keeps_its_stamp_joints_rows_and_spacing_and_the_first_one_is_begun_at_its_beginning(name):
    policy = make_policy(name)
    for given in (situation(), situation(running=None, delay=math.nan)):
        chunk = answer(given)
        assert policy.prepare(given).observation.stamp_ns == chunk.stamp_ns
        placed = policy.place(chunk, given, chunk.stamp_ns + ns(0.2))
        assert (placed.stamp_ns, placed.joint_names, placed.dt) == (chunk.stamp_ns, NAMES, DT)
        assert placed.positions.shape == chunk.positions.shape and np.isfinite(placed.positions).all()
    np.testing.assert_array_equal(placed.positions[:5], chunk.positions[:5])


def test_asynchronous_chunks_are_the_engines_own():
    given = situation()
    chunk = answer(given)
    policy = make_policy("asynchronous")
    assert policy.place(chunk, given, ns(9)) is chunk and policy.prepare(given).continuation is None
    assert policy.due(RUNNING, RUNNING.stamp_ns + 1)


def test_synchronous_looks_only_once_the_robot_stands_and_carries_out_the_whole_part():
    policy = Synchronous(execute=0.4, settle=0.1)
    first = policy.place(answer(situation(running=None)), situation(running=None), ns(1.6))
    np.testing.assert_array_equal(first.positions[8:], np.repeat(first.positions[7:8], ROWS - 8, axis=0))
    stands = first.stamp_ns + ns(0.4)
    assert not policy.due(first, stands + ns(0.09)) and policy.due(first, stands + ns(0.1)) and policy.due(None, 0)
    given = situation(2.0, running=first)
    chunk = answer(given)
    now = chunk.stamp_ns + ns(0.225)
    placed = policy.place(chunk, given, now)
    # Still until it arrives, then row by row from the beginning: between two rows here, as 0.225 s are 4.5 rows.
    np.testing.assert_allclose(placed.positions[:4], np.repeat(first.positions[-1:], 4, axis=0))
    np.testing.assert_allclose(placed.positions[5:12], (chunk.positions[:7] + chunk.positions[1:8]) / 2)
    np.testing.assert_allclose(placed.positions[12:], np.repeat(chunk.positions[7:8], ROWS - 12, axis=0))


def test_ensembling_weighs_what_every_chunk_says_of_a_moment_as_the_paper_does():
    given = situation(recent=(RUNNING, answer(situation(1.2), 0.1)))
    chunk = answer(given)
    placed = TemporalEnsembling(decay=0.5).place(chunk, given, ns(1.6))
    stamps = row_stamps(chunk)
    for row, stamp in enumerate(stamps):
        reaching = [c for c in (*given.recent, chunk) if row_stamps(c)[-1] >= stamp]  # oldest first
        weights = np.exp(-0.5 * np.arange(len(reaching)))
        said = np.array([positions_at(c, np.array([stamp]))[0] for c in reaching])
        np.testing.assert_allclose(placed.positions[row], weights @ said / weights.sum())
    np.testing.assert_array_equal(placed.positions[-1], chunk.positions[-1])


def test_the_soft_mask_is_that_of_the_paper():
    rows, delay, horizon = 16, 4, 12  # H, d, H - s of the paper
    expected = []
    for i in range(rows):
        c = (horizon - i) / (horizon - delay + 1)
        expected.append(1.0 if i < delay else c * (math.exp(c) - 1) / (math.e - 1) if i < horizon else 0.0)
    np.testing.assert_allclose(soft_mask(rows, delay, horizon), expected)
    assert np.all(np.diff(soft_mask(rows, delay, horizon)) <= 0)
    assert not soft_mask(rows, 0, 0).any() and soft_mask(rows, rows, rows).all()


def test_real_time_chunking_freezes_what_will_have_been_executed_at_the_moments_of_the_new_rows():
    policy = make_policy("real_time_chunking: {overlap: 0.2}")
    asked = policy.prepare(situation(1.43, delay=0.23)).continuation
    assert np.count_nonzero(asked.weights == 1.0) == 5  # 0.23 s of delay are passed within the fifth row
    assert np.count_nonzero(asked.weights) == 5 + 4
    times = 1.43 + DT * np.arange(1, ROWS + 1)
    np.testing.assert_allclose(asked.positions[:, 0], np.minimum(0.5 * (times - 1.0), 0.5 * ROWS * DT), atol=1e-9)


def test_real_time_chunking_lets_go_of_a_plan_for_another_instruction_and_of_one_that_ends():
    policy = make_policy("real_time_chunking")
    other = policy.prepare(situation(1.4, same=False)).continuation.weights
    assert set(other) == {0.0, 1.0} and other.sum() == 5
    ending = policy.prepare(situation(1.85)).continuation.weights  # three rows of the running chunk are left
    assert np.count_nonzero(ending) == 3
    assert policy.prepare(situation(running=None)).continuation is None


@pytest.mark.parametrize("name", POLICIES)
def test_a_camera_whose_clock_is_ahead_makes_no_policy_stumble(name):
    policy, given = make_policy(name), situation(delay=-0.03)
    asked = policy.prepare(given)
    assert asked.continuation is None or np.isfinite(asked.continuation.weights).all() and asked.continuation.prefix == 0
    placed = policy.place(answer(given), given, given.observation.stamp_ns - ns(0.03))
    assert np.isfinite(placed.positions).all()


def test_a_trained_prefix_is_what_will_have_been_executed():
    policy = make_policy("trained_prefix")
    asked = policy.prepare(situation(1.43, delay=0.23)).continuation
    assert asked.prefix == 5
    np.testing.assert_allclose(asked.positions[:5, 0], 0.5 * (0.43 + DT * np.arange(1, 6)))
    assert policy.prepare(situation(1.85)).continuation.prefix == 3  # the running chunk ends before the new one comes
    assert policy.prepare(situation(running=None)).continuation is None


def test_rolling_the_state_forward_adds_what_the_plan_moves_until_the_chunk_arrives():
    policy = make_policy("state_roll_forward")
    given = situation(1.4, delay=0.23)
    lagging = observation(1.4, given.observation.joints.position - 0.02)
    given = Situation(lagging, given.running, (), True, 0.23)
    asked = policy.prepare(given).observation
    np.testing.assert_allclose(asked.joints.position, lagging.joints.position + 0.5 * 0.25)
    assert asked.stamp_ns == lagging.stamp_ns and asked.joints.stamp_ns == lagging.joints.stamp_ns
    chunk = ActionChunk(asked.stamp_ns, NAMES, ramp(asked, 0.3), DT)
    placed = policy.place(chunk, given, ns(1.6))
    np.testing.assert_allclose(placed.positions[:5], positions_at(RUNNING, row_stamps(chunk)[:5]))
    np.testing.assert_array_equal(placed.positions[5:], chunk.positions[:-5])


def test_cancelling_the_offset_meets_the_running_plan_on_arrival_and_the_engines_chunk_after_the_fade():
    policy = make_policy("offset_cancel: {fade: 0.3}")
    given = situation()
    chunk = answer(given)
    now = chunk.stamp_ns + ns(0.2)
    placed = policy.place(chunk, given, now)
    np.testing.assert_allclose(placed.positions[3], positions_at(RUNNING, np.array([now]))[0])
    np.testing.assert_array_equal(placed.positions[9:], chunk.positions[9:])
    steps = np.abs(placed.positions - chunk.positions)[3:10, 0]
    assert np.all(np.diff(steps) < 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("real_time_chunkin", "did you mean 'real_time_chunking'"),
        ("", "is not understood"),
        ("[1, 2]", "is not understood"),
        ("synchronous: 3", "is not understood"),
        ("{synchronous: {}, asynchronous: {}}", "is not understood"),
        ("a: b: c", "is not understood"),
        ("synchronous: {exekute: 1}", "has no option 'exekute'; it has execute, settle"),
        ("synchronous: {execute: soon}", "execute is 'soon'; it must be a number from 0 to 60"),
        ("synchronous: {execute: .nan}", "execute is nan"),
        ("synchronous: {execute: -1}", "execute is -1"),
        ("asynchronous: {execute: 1}", "it has none"),
        ("offset_cancel: {fade: 0}", "must be above 0"),
        ("real_time_chunking: {begin: 1.5}", "begin is 1.5; it must be a flow time"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(text, says):
    with pytest.raises(InferencePolicyError, match=says):
        make_policy(text)


def test_options_reach_the_policy():
    assert make_policy("synchronous: {execute: 1, settle: 0.5}") == Synchronous(1.0, 0.5)
    assert make_policy("temporal_ensembling: {decay: -0.1}") == TemporalEnsembling(-0.1)
