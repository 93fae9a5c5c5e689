"""What tests of compression share: a layer with difficult inputs, and the tiny policy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tiny_subject import COLUMNS, ROWS, Subject, load_tiny

from vla_edge.compress.statistics import InputStatistics


@pytest.fixture(scope="session")
def inputs() -> np.ndarray:
    """Correlated channels, a few of them thirty times as large as the others, as in language models."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(COLUMNS, COLUMNS)) / np.sqrt(COLUMNS) + np.eye(COLUMNS)
    scale = np.where(rng.random(COLUMNS) < 0.05, 30.0, 1.0)
    return np.float32(rng.normal(size=(2000, COLUMNS)) @ mix * scale + 0.3 * scale)


@pytest.fixture(scope="session")
def statistics(inputs) -> InputStatistics:
    statistics = InputStatistics()
    for part in np.split(inputs, [0, 300, 900]):  # empty and uneven parts
        statistics.update(part.reshape(-1, 1, COLUMNS))
    return statistics


@pytest.fixture(scope="session")
def weight() -> np.ndarray:
    return np.float32(np.random.default_rng(1).normal(size=(ROWS, COLUMNS)) * 0.05)


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """(policy, checkpoint), for all tests together: whoever changes the policy takes a copy."""
    return load_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def subject(loaded):
    """The tiny policy, a copy for this test."""
    return Subject(copy.deepcopy(loaded[0]), loaded[1])
