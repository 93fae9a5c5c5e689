"""Joint states are matched by name and checked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vla_edge.observe.joints import JointStateError, JointStateReader

NAMES = ("shoulder", "elbow", "wrist")


def test_joints_are_found_by_name_in_any_order_and_company():
    read = JointStateReader(NAMES)
    state = read(7, ["hip", "wrist", "elbow", "shoulder"], [9.0, 3.0, 2.0, 1.0], [0.0, 0.3, 0.2, 0.1])
    assert state.stamp_ns == 7 and state.names == NAMES
    np.testing.assert_array_equal(state.position, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(state.velocity, [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(state.effort, np.zeros(3))


def test_a_change_of_order_between_messages_is_followed():
    read = JointStateReader(NAMES)
    read(1, list(NAMES), [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(read(2, list(reversed(NAMES)), [1.0, 2.0, 3.0]).position, [3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("names", "position", "velocity", "says"),
    [
        (["shoulder", "elbow"], [1.0, 2.0], [], "lacks wrist"),
        ([*NAMES, "elbow"], [1.0, 2.0, 3.0, 4.0], [], "elbow twice"),
        (list(NAMES), [1.0, 2.0], [], "2 values of position"),
        (list(NAMES), [], [], "0 values of position"),
        (list(NAMES), [1.0, math.nan, 3.0], [], "position of elbow is not finite"),
        (list(NAMES), [1.0, 2.0, 3.0], [0.0, 0.0, math.inf], "velocity of wrist is not finite"),
    ],
)
def test_a_joint_state_that_must_not_be_used_is_named(names, position, velocity, says):
    with pytest.raises(JointStateError, match=says):
        JointStateReader(NAMES)(1, names, position, velocity)


def test_a_joint_of_others_may_be_anything():
    state = JointStateReader(NAMES)(1, [*NAMES, "gripper"], [1.0, 2.0, 3.0, math.nan])
    assert np.isfinite(state.position).all()
