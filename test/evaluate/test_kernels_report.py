"""Kernels of a plan, from a file in the layout of TensorRT 10's engine inspector (detailed) to the page of a report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import browse, needs_browser

from vla_edge.engine.kernels import Kernel, kernels_beside
from vla_edge.engine.target import Attempt, Draft, Outcome, Target
from vla_edge.evaluate.kernels_report import SLOWEST
from vla_edge.evaluate.target_report import write_target_report

PLAN = Path(__file__).with_name("vision.plan")
BEST = Attempt(Draft(), "where it starts from", 8.0, 9.0, 0.01, 300_000_000, 30_000_000, "compute")
OUTCOME = Outcome(Target(rate_hz=100), (BEST,), BEST)


@pytest.fixture
def page(tmp_path):
    return write_target_report(OUTCOME, tmp_path / "engine.html", "engine", {"vision": kernels_beside(PLAN)})


def test_types_are_read_off_the_formats_of_tensors():
    told = {kernel.name: kernel for kernel in kernels_beside(PLAN)}
    assert told["image_reformat"].precision == "float32 to float16"
    assert told["/encoder/patch_embedding/Conv"].precision == "float16"
    assert told["__myl_MulMeanSubMulMeanAddSqrDivMulAdd_myl0_0"].precision == "float16 to int8"
    products = told["layers.0.q+layers.0.k+layers.0.v_myl0_1"]
    assert (products.kind, products.precision) == ("gemm", "int8 to float16")
    assert products.tactic.startswith("sm80_xmma_gemm_i8f16_i8i32") and products.ms > 0


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("BFloat16", "bfloat16"), ("Row major linear BFloat16 format", "bfloat16"), ("FP8E4M3", "fp8"), ("FP4E2M1", "fp4"),
        ("Int4", "int4"), ("Int64", "int64"), ("Float", "float32"), ("N/A due to dynamic shapes", ""),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
    ],
)  # fmt: skip
def test_every_way_to_name_a_type_is_known(told, kind, tmp_path):
    (tmp_path / "s.kernels.json").write_text(
        f'{{"Layers": [{{"Name": "n", "Inputs": [], "Outputs": [{{"Format/Datatype": "{told}"}}]}}]}}'
    )
    assert kernels_beside(tmp_path / "s.plan") == (Kernel("n", outputs=(kind,) if kind else ()),)


def test_the_slowest_kernels_come_first_and_all_of_them_in_their_order(page):
    text = page.read_text(encoding="utf-8")
    parts = text.split("Kernels</h2>")[1].split("All of vision")
    slowest, whole = (re.findall(r"<tr><td>([^<]*)</td>", part) for part in parts)
    found = kernels_beside(PLAN)
    assert slowest == [k.name for k in sorted(found, key=lambda k: -k.ms)][:SLOWEST]
    assert whole == [kernel.name for kernel in found] and len(found) > SLOWEST


def test_without_a_plan_there_is_no_such_section(tmp_path):
    text = write_target_report(OUTCOME, tmp_path / "engine.html", "engine").read_text(encoding="utf-8")
    assert "What was tried" in text and "Kernels</h2>" not in text


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_real_browser_shows_it_within_the_page(page, tmp_path, theme):
    import cv2

    drawn = browse(page, tmp_path, "--dump-dom", query=f"?theme={theme}").stdout
    assert 'data-ready="yes"' in drawn and "sm80_xmma_gemm_i8f16_i8i32" in drawn
    picture = tmp_path / f"{theme}.png"
    browse(page, tmp_path, f"--screenshot={picture}", query=f"?theme={theme}")
    pixels = cv2.imread(str(picture)).astype(int)
    assert (pixels.mean() < 70) == (theme == "dark")
    # names of kernels are long: none runs over the edge of its section
    assert len({tuple(pixel) for pixel in pixels[:, -20:].reshape(-1, 3)}) == 1


@pytest.mark.slow
@needs_browser
def test_it_prints(page, tmp_path):
    paper = tmp_path / "engine.pdf"
    browse(page, tmp_path, f"--print-to-pdf={paper}", query="?theme=dark")
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 20_000
