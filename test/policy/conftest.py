"""A written checkpoint, and a copy of it that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    from small import WORDS, small_policy, small_spec

    from vla_edge.policy.checkpoint_writer import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("policy") / "checkpoint", small_policy(), small_spec(), WORDS)


@pytest.fixture
def directory(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))
