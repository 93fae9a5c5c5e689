"""Checkpoints that something is changed in, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vla_edge.policy.checkpoint import CheckpointError, load_checkpoint, load_policy


def edit(path: Path, **entries) -> None:
    """Entries of a JSON file by path, with `__` between keys and numbers of lists; None takes one out."""
    content = json.loads(path.read_text())
    for key, value in entries.items():
        *above, last = (int(part) if part.isdigit() else part for part in key.split("__"))
        inside = content
        for name in above:
            inside = inside[name]
        if value is None:
            inside.pop(last)
        else:
            inside[last] = value
    path.write_text(json.dumps(content))


def refused(directory: Path) -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_policy(load_checkpoint(directory))
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)
