"""Files and directories: one that is there as a whole or not at all, and what tells two apart."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla_edge.types import VlaEdgeError


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """`content` at `path`, which is never there in part, wherever the process ends."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(directory: Path, error: type[VlaEdgeError]) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` when the block ends well, and vanishes otherwise.

    Raises:
        error: nothing can be written beside `directory`.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".partial", dir=directory.parent))
    except OSError as problem:
        raise error(f"{directory} cannot be written: {problem}; choose another output") from problem
    try:
        yield temporary
        temporary.chmod(0o755)
        _replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, directory: Path) -> None:
    """Put `temporary` at `directory`; an older one there steps aside first, since a rename needs an empty place."""
    if not directory.exists():
        os.replace(temporary, directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".old", dir=directory.parent))
    try:
        os.replace(directory, aside / "old")
        os.replace(temporary, directory)
    except BaseException:
        if not directory.exists() and (aside / "old").exists():
            os.replace(aside / "old", directory)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
