"""Entries of a dataclass from a file that people write."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields


def entries(kind: type, plain, where: str, error: type[Exception], internal: tuple[str, ...] = ()) -> dict:
    """What `kind` is made of, as `plain` has it.

    Args:
        kind: a dataclass. internal: its fields that no file gives.
        plain: what the file says. where: which file, and where in it.
        error: what to raise.

    Raises:
        error: `plain` is no mapping, has an unknown key (named with the nearest valid one), or lacks one.
    """
    known = {entry.name: entry for entry in fields(kind) if entry.name not in internal}
    for key in mapping(plain, where, error):
        if key not in known:
            nearest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)[0]
            raise error(f"{where} has the unknown key {key!r}; did you mean {nearest!r}?")
    for name, entry in known.items():
        if name not in plain and entry.default is MISSING and entry.default_factory is MISSING:
            raise error(f"{where} lacks {name}")
    return dict(plain)


def mapping(plain, where: str, error: type[Exception]) -> Mapping:
    """`plain`, which has to map keys to values."""
    if not isinstance(plain, Mapping):
        raise error(f"{where} is {plain!r}; it must map keys to values")
    return plain
