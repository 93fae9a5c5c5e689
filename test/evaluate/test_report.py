from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import browse, needs_browser
from conftest import SPEC, Oracle, recording

from vla_edge.evaluate.bag_writer import write_bag
from vla_edge.evaluate.demo_report import judge_demo, write_demo_report
from vla_edge.evaluate.page import write_json
from vla_edge.evaluate.replay import evaluate_bag
from vla_edge.evaluate.report import write_report

HOSTILE = 'put the </script><script>alert(1)</script> {{body}} "cube" & <b>ball</b>'

DEMO = {
    "episodes": 12,
    "successes": 11,
    "chunk_rate_hz": 5.02,
    "observation_to_chunk_ms": {"p50": 61.0, "p95": 70.0, "p99": 81.0},
    "engine": {"name": "g1_tabletop", "precision": "int8", "backend": "onnxruntime", "bytes": 9_000_000,
               "stage_ms": {"vision": 20.0, "prefix": {"p50": 9.5}}},
    "controller": {"tick_hz": 1000.0, "lateness_us": {"p50": 50, "p99": 90, "p999": 150, "max": 300},
                   "ticks": 90000, "limit_hits": 3, "holds": 0},
    "replay": {"frames": 100, "action_mae_rad": 0.02},
    "episode_results": [
        {"seed": 7, "instruction": HOSTILE, "success": True, "wrong_first": False, "seconds": 3.25},
        {"seed": 8, "instruction": "touch the red cube", "success": False, "wrong_first": True, "seconds": 10.0},
    ],
}


class Outline(HTMLParser):
    """Checks that elements close, and collects what a page loads and says."""

    VOID = {"meta", "link", "img", "input", "br", "hr"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.sources, self.words, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "action", "poster"):
                self.sources.append(value)
            if key == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    items = recording(12.0, instructions=((0.0, "touch the red cube"), (5.0, HOSTILE)))
    bag = write_bag(tmp_path_factory.mktemp("recording") / "bag", items)
    return evaluate_bag(bag, Oracle(SPEC, sigma=0.02), Oracle(SPEC), samples=2)


def test_the_page_is_whole_loads_nothing_and_says_the_verdict_first(evaluation, tmp_path):
    html, *_ = write_report(evaluation, tmp_path / "out" / "report.html")
    text = html.read_text(encoding="utf-8")
    outline = Outline(text)
    assert all(source.startswith(("data:", "#")) for source in outline.sources)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert text.index('id="verdict"') < text.index('class="cards"') < text.index('id="trajectories"')
    assert len(outline.ids) == len(set(outline.ids))
    assert "{{" not in text.replace("{{body}}", "")
    assert sorted(path.name for path in html.parent.iterdir()) == ["report.html", "report.json", "report.md"]


def test_text_from_the_recording_cannot_break_the_page(evaluation, tmp_path):
    html, *_ = write_report(evaluation, tmp_path / "report.html")
    text = html.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<b>ball" not in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))
    assert data["traces"]["joints"] == list(evaluation.joint_names)


def test_the_json_beside_it_holds_the_same_figures_and_no_nan(evaluation, tmp_path):
    _, path, _ = write_report(evaluation, tmp_path / "report.html")
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert found["action_mae_rad"] == evaluation.action_mae_rad
    assert found["frames"] == len(found["results"]) == evaluation.frames
    assert found["compression"]["relative"] == evaluation.compression.relative
    assert found["passed"] is all(check["passed"] for check in found["checks"])


def test_the_same_recording_gives_the_same_page_to_the_byte(evaluation, tmp_path):
    first, *_ = write_report(evaluation, tmp_path / "a" / "report.html")
    second, *_ = write_report(evaluation, tmp_path / "b" / "report.html")
    assert first.read_bytes() == second.read_bytes()


def test_packed_trajectories_are_exact_to_a_tenth_of_a_milliradian(evaluation, tmp_path):
    import base64

    html, *_ = write_report(evaluation, tmp_path / "report.html")
    data = json.loads(re.search(r'id="data">(.*?)</script>', html.read_text(), re.S).group(1))["traces"]
    packed = np.frombuffer(base64.b64decode(data["chunk"]), "<i2").reshape(-1, data["steps"], len(data["joints"]))
    expected = np.stack([trace.chunk for trace in evaluation.traces])
    np.testing.assert_allclose(packed * 1e-4, expected, atol=0.51e-4)


def test_a_demo_passes_or_fails_by_its_limits():
    assert judge_demo(DEMO).passed
    assert [c.name for c in judge_demo({**DEMO, "successes": 9}).checks if not c.passed] == ["success_rate"]
    assert [c.name for c in judge_demo({**DEMO, "chunk_rate_hz": None}).checks if not c.passed] == ["chunk_rate_hz"]
    assert not judge_demo({**DEMO, "episodes": 0, "successes": 0}).passed
    failed = judge_demo(DEMO, problems=("the bag could not be replayed",))
    assert not failed.passed and failed.checks[-1].sentence == "the bag could not be replayed"


def test_a_demo_report_shows_episodes_loop_and_replay(evaluation, tmp_path):
    film = tmp_path / "film.gif"
    film.write_bytes(b"GIF89a")
    html, path = write_demo_report(DEMO, tmp_path / "report.html", evaluation, film)
    outline = Outline(html.read_text(encoding="utf-8"))
    words = " ".join(outline.words)
    assert "11 of 12 instructions were carried out" in words and HOSTILE in words and "lateness us p999" in words
    assert "data:image/gif;base64,R0lGODlh" in outline.sources
    found = json.loads(path.read_text())
    assert found["passed"] and {key: found[key] for key in DEMO} == DEMO


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = write_json(tmp_path / "report.json", {"kept": 1})
    with pytest.raises(TypeError):
        write_json(target, {"picture": b"jpeg"})
    assert json.loads(target.read_text()) == {"kept": 1}
    write_json(target, {"value": math.nan})
    assert json.loads(target.read_text()) == {"value": None}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_real_browser_draws_every_chart_without_an_error(evaluation, tmp_path, theme):
    import cv2

    html, *_ = write_report(evaluation, tmp_path / "report.html")
    picture = tmp_path / f"{theme}.png"
    drawn = browse(html, tmp_path, "--dump-dom", query=f"?theme={theme}")
    assert 'data-ready="yes"' in drawn.stdout
    charts = re.findall(r'<div class="chart"[^>]*>(.*?)</div></div>', drawn.stdout.replace("\n", ""), re.S)
    # trajectories, by joint, over the horizon, over the recording, latency twice, disagreement
    assert len(charts) == 7
    assert all("<path" in chart or "<rect" in chart or "<circle" in chart for chart in charts)
    assert "NaN" not in "".join(charts)
    browse(html, tmp_path, f"--screenshot={picture}", query=f"?theme={theme}")
    pixels = cv2.imread(str(picture))
    assert pixels.shape[:2] == (2600, 1200)
    assert (pixels.mean() < 70) == (theme == "dark")


@pytest.mark.slow
@needs_browser
def test_filters_narrow_what_is_shown(evaluation, tmp_path):
    html, *_ = write_report(evaluation, tmp_path / "report.html")
    whole = browse(html, tmp_path, "--dump-dom").stdout
    part = browse(html, tmp_path, "--dump-dom", query="?instruction=touch%20the%20red%20cube").stdout
    told = [re.search(r'id="selection"[^>]*>([^<]*)<', text).group(1) for text in (whole, part)]
    group = evaluation.instructions["touch the red cube"]
    assert told[0].startswith(f"{evaluation.frames} of {evaluation.frames} frames")
    assert told[1].startswith(f"{group.frames} of {evaluation.frames} frames")
    hidden = [len(re.findall(r'<figure data-frame="\d+" hidden', text)) for text in (whole, part)]
    others = sum(evaluation.results[s.frame].instruction != "touch the red cube" for s in evaluation.snapshots)
    assert hidden == [0, others] and others > 0


@pytest.mark.slow
@needs_browser
def test_it_prints(evaluation, tmp_path):
    html, *_ = write_report(evaluation, tmp_path / "report.html")
    paper = tmp_path / "report.pdf"
    browse(html, tmp_path, f"--print-to-pdf={paper}", query="?theme=dark")
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 20_000


def test_markdown_beside_it_has_the_verdict_and_every_joint(evaluation, tmp_path):
    *_, markdown = write_report(evaluation, tmp_path / "report.html")
    lines = markdown.read_text().splitlines()
    assert evaluation.bag in lines[0]
    for name in evaluation.joint_names:
        assert any(line.startswith(f"| {name} |") for line in lines)
    # text from the recording stays in its cell
    rows = [line for line in lines if "<script>" in line]
    assert len(rows) == 1 and rows[0].count("|") == 5
