from __future__ import annotations

import numpy as np
import pytest

from vla_edge.serve.plan import end_ns, positions_at, row_stamps, strayed
from vla_edge.types import ActionChunk, JointState

STAMP = 1_700_000_000_123_456_789
CHUNK = ActionChunk(STAMP, ("a", "b"), np.cumsum(np.random.default_rng(0).normal(size=(6, 2)), axis=0), 0.05)


def test_a_plan_is_read_between_its_rows_and_stands_at_its_end():
    stamps = STAMP + np.array([50_000_000, 75_000_000, 300_000_000, 900_000_000])
    expected = [np.interp([0.05, 0.075, 0.3, 0.9], 0.05 * np.arange(1, 7), CHUNK.positions[:, j]) for j in (0, 1)]
    np.testing.assert_allclose(positions_at(CHUNK, stamps), np.transpose(expected), atol=1e-12)
    np.testing.assert_array_equal(positions_at(CHUNK, row_stamps(CHUNK)), CHUNK.positions)
    assert row_stamps(CHUNK)[-1] == end_ns(CHUNK) == STAMP + 300_000_000


def test_before_its_first_row_a_plan_goes_on_as_a_line():
    before = positions_at(CHUNK, np.array([STAMP]))[0]
    np.testing.assert_allclose(before, 2 * CHUNK.positions[0] - CHUNK.positions[1])
    single = ActionChunk(STAMP, ("a", "b"), [[1.0, 2.0]], 0.05)
    np.testing.assert_array_equal(positions_at(single, np.array([STAMP, STAMP + 10**9])), [[1.0, 2.0]] * 2)


def test_joints_are_matched_by_name():
    stamps = row_stamps(CHUNK)
    np.testing.assert_array_equal(positions_at(CHUNK, stamps, ("b", "a")), CHUNK.positions[:, ::-1])
    joints = JointState(STAMP, ("b", "x", "a"), [CHUNK.positions[1, 1], 9.0, CHUNK.positions[1, 0] - 0.2])
    assert strayed(CHUNK, joints, int(stamps[1])) == pytest.approx(0.2)
