"""Files and directories: one that is there as a whole or not at all, and what tells two apart."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vla_edge.types import VlaEdgeError

_PARTIAL, _ASIDE = ".partial", ".old"


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
def whole_directory(directory: Path, error: type[VlaEdgeError], replaces: bool = True) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` when the block ends well, and vanishes otherwise; if the
    process is killed, the next one that writes the same removes it.

    Args:
        replaces: what is there when the block ends; otherwise that stays, and the rename fails.

    Raises:
        error: nothing can be written beside `directory`.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _put_right(directory)
        temporary, held = _reserve(directory, _PARTIAL)
    except OSError as problem:
        raise error(f"{directory} cannot be written: {problem}; choose another output") from problem
    try:
        yield temporary
        temporary.chmod(0o755)
        (_replace if replaces else os.rename)(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


def _replace(temporary: Path, directory: Path) -> None:
    """Put `temporary` at `directory`; an older one there steps aside first, since a rename needs an empty place."""
    if not directory.exists():
        os.replace(temporary, directory)
        return
    aside, held = _reserve(directory, _ASIDE)
    try:
        os.replace(directory, aside / "old")
        os.replace(temporary, directory)
    except BaseException:
        _put_back(aside, directory)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(held)


def _reserve(directory: Path, suffix: str) -> tuple[Path, int]:
    """A new directory beside another, and its open descriptor, whose lock says that a process is at work in it: the system
    takes the lock away however the process ends. Where a file system has no locks, nobody clears up either."""
    while True:
        reserved = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=suffix, dir=directory.parent))
        with suppress(FileNotFoundError):  # it was not locked yet, and another process took it for one left behind
            held = os.open(reserved, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX)
            if reserved.exists():
                return reserved, held
            os.close(held)


def _put_right(directory: Path) -> None:
    """Clears up what processes that were killed while they wrote `directory` left behind."""
    for suffix in (_ASIDE, _PARTIAL):
        for left in directory.parent.glob(f".{glob.escape(directory.name)}-????????{suffix}"):
            with suppress(OSError):
                held = os.open(left, os.O_RDONLY)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if suffix == _ASIDE:
                        _put_back(left, directory)
                    shutil.rmtree(left)
                finally:
                    os.close(held)


def _put_back(aside: Path, directory: Path) -> None:
    if (aside / "old").exists() and not directory.exists():
        os.replace(aside / "old", directory)
