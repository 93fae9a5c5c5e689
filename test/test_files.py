"""A directory that is there as a whole or not at all, wherever the processes that write it end."""

import subprocess
import sys

import pytest

from vla_edge.files import whole_directory
from vla_edge.types import VlaEdgeError

WRITER = """
import sys
from pathlib import Path
from vla_edge import files
with files.whole_directory(Path(sys.argv[1]), ValueError) as directory:
    (directory / "part").write_text("half of it")
    {then}
"""
WAIT = "print(flush=True); sys.stdin.read()"
# killed when the older directory has stepped aside and the new one is not in its place yet
BETWEEN = "import os; os.replace = lambda *paths, move=os.replace: print(flush=True) or move(*paths) or sys.stdin.read()"


def killed(path, then: str = WAIT) -> None:
    process = started(path, then)
    process.kill()
    process.wait(30)
    process.stdin.close()
    process.stdout.close()


def started(path, then: str = WAIT) -> subprocess.Popen:
    program = [sys.executable, "-c", WRITER.format(then=then), str(path)]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def write(path, text: str) -> None:
    with whole_directory(path, VlaEdgeError) as directory:
        (directory / "part").write_text(text)


def test_what_killed_processes_left_behind_is_removed_by_the_next_that_writes_the_same(tmp_path):
    killed(tmp_path / "it-else")
    (other,) = tmp_path.iterdir()
    for _ in range(3):
        killed(tmp_path / "it")
        assert len(list(tmp_path.iterdir())) == 2 and other.exists()
    write(tmp_path / "it", "all of it")
    assert {path.name for path in tmp_path.iterdir()} == {"it", other.name}
    assert (tmp_path / "it" / "part").read_text() == "all of it"


def test_a_process_at_work_is_left_alone(tmp_path):
    other = started(tmp_path / "it")
    write(tmp_path / "it", "all of it")
    assert len(list(tmp_path.iterdir())) == 2
    other.communicate()
    assert other.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it" / "part").read_text() == "half of it"


def test_what_stepped_aside_comes_back_when_the_process_was_killed_then(tmp_path):
    write(tmp_path / "it", "the first")
    killed(tmp_path / "it", BETWEEN)
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "it", VlaEdgeError):
        1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it" / "part").read_text() == "the first"


def test_one_within_another(tmp_path):
    with whole_directory(tmp_path / "outer", VlaEdgeError) as outer:
        write(outer / "inner", "all of it")
    assert (tmp_path / "outer" / "inner" / "part").read_text() == "all of it"


def test_what_came_there_meanwhile_stays_where_nothing_may_be_replaced(tmp_path):
    with pytest.raises(OSError), whole_directory(tmp_path / "it", VlaEdgeError, replaces=False):
        write(tmp_path / "it", "another's")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it" / "part").read_text() == "another's"
