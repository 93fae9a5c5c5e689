"""A profile covers the network and the host, and is told to people and machines."""

from __future__ import annotations

import json

import pytest

from vla_edge.cli import main
from vla_edge.engine.bottleneck import LEVERS
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.profile import peak_bytes, profile_bundle
from vla_edge.engine.roofline import Roofline
from vla_edge.evaluate.profile_report import summary, write_profile_report


@pytest.fixture(scope="module")
def found(bundle, data):
    machine = Roofline(1e10, {"float32": 1e11, "int8": 4e11})
    return profile_bundle(Bundle.load(bundle), data.held_out, repeats=4, roofline=machine)


def test_every_part_of_an_inference_and_of_the_hosts_work_is_timed(found, bundle):
    assert set(found.parts) == {"preprocess", "vision", "prefix", "denoise", "postprocess", "total"}
    assert set(found.host) == {"image decode", "image resize", "tokenization", "post-processing"}
    assert all(row["n"] == 4 and row["p50"] <= row["p99"] for row in (*found.parts.values(), *found.host.values()))
    assert found.bundle_bytes == Bundle.load(bundle).bytes < found.peak_bytes


def test_stages_are_held_against_the_roofline(found):
    assert set(found.stages) == {"vision", "prefix", "denoise"} and found.stages["denoise"].calls == 3
    assert all(0 < figures.of_roofline <= 1 and figures.bottleneck in LEVERS for figures in found.stages.values())
    assert found.lever == LEVERS[found.bottleneck]


def test_it_is_told_as_text_page_and_json(found, tmp_path):
    text = summary(found)
    assert f"held back by {found.bottleneck}" in text and "image decode" in text
    page = write_profile_report(found, tmp_path / "p.html", "tiny")
    assert found.lever in page.read_text()
    assert json.loads((tmp_path / "p.json").read_text())["parts"]["total"]["n"] == 4


def test_the_command_says_what_is_missing(tmp_path, capsys, bundle):
    assert main(["profile", str(tmp_path)]) == 2
    assert "is no engine bundle" in capsys.readouterr().err
    assert main(["profile", str(bundle), "--bag", str(tmp_path / "no_bag")]) == 2
    assert "no_bag" in capsys.readouterr().err


def test_the_memory_of_a_process_is_its_own():
    """And not that of the larger one it was started by."""
    import subprocess
    import sys

    ballast = bytearray(200_000_000)
    program = "from vla_edge.engine.profile import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 1_000_000 < int(done.stdout) < len(ballast) < peak_bytes()


def test_a_file_that_is_mapped_twice_is_in_memory_once(tmp_path):
    """As the weights that two stages share; what is not mapped counts as before."""
    import subprocess
    import sys

    size = 64_000_000
    (tmp_path / "weights").write_bytes(bytes(range(256)) * (size // 256))
    program = """
import mmap, sys
from vla_edge.engine.profile import peak_bytes
before, kept = peak_bytes(), []
for _ in range(int(sys.argv[2])):
    with open(sys.argv[1], "rb") as file:
        kept.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    sum(kept[-1][::4096])
kept.append(bytearray(b"1") * 32_000_000)
print(peak_bytes() - before)
"""
    grown = []
    for times in ("1", "3"):
        arguments = [sys.executable, "-c", program, str(tmp_path / "weights"), times]
        grown.append(int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout))
    assert all(size + 30_000_000 < each < size + 50_000_000 for each in grown), grown
