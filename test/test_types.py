"""The nouns are frozen, shaped and their own copies."""

import dataclasses

import numpy as np
import pytest

from vla_edge.types import ActionChunk, JointState, freeze

NAMES = ("a", "b")


def test_freeze_copies_and_locks():
    source = np.arange(4.0)
    frozen = freeze(source)
    source[0] = 9.0
    assert frozen[0] == 0.0
    with pytest.raises(ValueError):
        frozen[0] = 1.0


@pytest.mark.parametrize("shape", [(3,), (2, 3), (None, None)])
def test_freeze_names_the_wrong_shape(shape):
    with pytest.raises(ValueError, match="goal has shape"):
        freeze(np.zeros(2), shape=shape, what="goal")


def test_joint_state_fills_what_was_not_measured_with_zeros():
    state = JointState(5, ["a", "b"], [0.1, 0.2])
    assert state.names == NAMES
    assert state.position.dtype == np.float64
    np.testing.assert_array_equal(state.velocity, [0.0, 0.0])
    np.testing.assert_array_equal(state.effort, [0.0, 0.0])


def test_joint_state_refuses_another_number_of_values_than_names():
    with pytest.raises(ValueError, match="JointState.position"):
        JointState(0, NAMES, [0.1])
    with pytest.raises(ValueError, match="JointState.velocity"):
        JointState(0, NAMES, [0.1, 0.2], [0.0])


def test_chunk_knows_its_horizon_and_refuses_other_shapes():
    chunk = ActionChunk(0, NAMES, np.zeros((32, 2)), 0.05)
    assert chunk.horizon == pytest.approx(1.6)
    for shape in [(32,), (32, 3), (2, 32, 2)]:
        with pytest.raises(ValueError, match="ActionChunk.positions"):
            ActionChunk(0, NAMES, np.zeros(shape), 0.05)


def test_nouns_cannot_be_changed():
    state = JointState(0, NAMES, [0.1, 0.2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.stamp_ns = 1
    with pytest.raises(ValueError):
        state.position[0] = 3.0
