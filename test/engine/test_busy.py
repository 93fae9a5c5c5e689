"""What other programs take of this computer meanwhile is told; what the build itself takes is not held against it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from vla_edge.engine import busy
from vla_edge.engine.busy import OtherPrograms, caution


def test_others_are_what_is_busy_and_not_of_this_process(monkeypatch):
    counts = iter([(100.0, 7.0, 0.0), (106.0, 9.0, 8.0)])
    monkeypatch.setattr(busy, "_seconds", lambda: next(counts))
    assert OtherPrograms().processors() == 0.5


def test_waiting_and_processors_of_others_are_not_busy_and_guests_count_once(monkeypatch, tmp_path):
    row = "10 20 30 999 999 1 2 3 500 500"  # idle and waiting for disks, then guests, are not added
    monkeypatch.setattr(busy, "COUNTS", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    busy.COUNTS.write_text(f"cpu  {row}\ncpu0 9 9 9 9 9 9 9 9 0 0\ncpu1 {row}\ncpu11 {row}\nintr 5\n")
    assert busy._seconds()[0] == pytest.approx(66 / os.sysconf("SC_CLK_TCK"))


def test_nothing_is_told_where_the_system_tells_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(busy, "COUNTS", tmp_path / "none")
    assert OtherPrograms().processors() is None
    assert caution({"machine": {"taken_by_others": None}}) == caution({}) == ""


@pytest.mark.skipif(not busy.COUNTS.is_file(), reason="no /proc/stat")
def test_another_program_is_noticed():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        others = OtherPrograms()
        time.sleep(1.0)
        taken = others.processors()
        other.kill()
    assert taken > 0.5
