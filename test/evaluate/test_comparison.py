"""Engines side by side: paired seeds, nothing run twice, and a page that says what was measured."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from vla_edge.evaluate import comparison as subject
from vla_edge.evaluate.comparison import Comparison, Contender, episodes
from vla_edge.evaluate.comparison_report import summary, write_comparison_report
from vla_edge.evaluate.metrics import mcnemar


class Ended:
    def __init__(self, seed: int, success: bool):
        self.seed, self.success = seed, success


@pytest.fixture
def runs(monkeypatch):
    """What was run, in place of the simulation: odd seeds succeed."""
    ran = []

    def run(policy, seeds, tier, workers, progress, world):
        for seed in seeds:
            ran.append(seed)
            progress(Ended(seed, bool(seed % 2)))

    monkeypatch.setattr(subject, "run_closed_loop", run)
    return ran


def test_finished_episodes_are_not_run_again(runs, tmp_path):
    file = tmp_path / "deep" / "episodes.jsonl"
    assert episodes("policy", range(4), "hard", file=file) == {0: False, 1: True, 2: False, 3: True}
    with open(file, "a", encoding="utf-8") as half:
        half.write('{"seed": 4, "succ')  # killed while writing
    told = []
    assert episodes("policy", range(2, 7), "hard", file=file, progress=told.append)[5] is True
    assert runs == [0, 1, 2, 3, 4, 5, 6] and told[-1] == 1.0
    assert len(episodes("policy", range(7), "hard", file=file)) == 7 and len(runs) == 8


def test_episodes_of_another_controller_are_run_again(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "_fingerprint", lambda _: "policy")
    for world in ("one", "one", "other"):
        monkeypatch.setattr(subject, "_world", lambda world=world: world)
        subject.compare_engines(tmp_path, {}, range(3), "hard", store=tmp_path / "episodes")
    assert runs == [0, 1, 2] * 2


def test_the_bound_covers_what_is_true_as_often_as_it_says():
    """Drawn many times over from known rates, the truth lies above the bound in at most about one case of twenty."""
    rng = np.random.default_rng(0)
    for only_first, only_second, n in ((0.05, 0.04, 600), (0.02, 0.02, 300), (0.10, 0.05, 1000)):
        draws = rng.multinomial(n, [only_first, only_second, 1 - only_first - only_second], size=2000)
        misses = 0
        for first, second, same in draws:
            a = [True] * first + [False] * second + [True] * same
            b = [False] * first + [True] * second + [True] * same
            misses += mcnemar(a, b).drop_bound() < only_first - only_second
        assert misses / 2000 < 0.065
    assert mcnemar([True] * 100, [True] * 100).drop_bound() > 0, "seeing no difference is not knowing there is none"


def contender(name: str, error: float, megabytes: float, results: dict, reference: dict) -> Contender:
    verification = {
        "action_error_rel": error, "frame_error_rel": [error / 2, 2 * error], "cosine": 0.99, "frames": 8,
        "per_joint": {"left_elbow": error / 10, "waist_yaw": error / 20},
    }  # fmt: skip
    profile = {"vision": {"p50": 2.0}, "total": {"p50": 10 * error}}
    paired = mcnemar([reference[s] for s in reference], [results[s] for s in reference]) if reference else None
    return Contender(
        name,
        subject.Path(name),
        f"recipe <{name}>",
        4.5,
        int(megabytes * 1e6),
        1000,
        verification,
        profile,
        results,
        paired,
    )


@pytest.mark.parametrize("acted", (True, False))
def test_the_page_and_the_table_say_the_same(tmp_path, acted):
    reference = {seed: seed % 2 == 0 for seed in range(100)} if acted else {}
    worse = {seed: success and seed > 9 for seed, success in reference.items()}
    found = Comparison(
        "g1_tabletop", "hard", reference,
        (contender("int8", 0.015, 3.4, reference, reference), contender("int4-rtn", 0.07, 2.0, worse, reference)),
    )  # fmt: skip
    html, plain = write_comparison_report(found, tmp_path / "compare.html")
    page, data = html.read_text(), json.loads(plain.read_text())
    assert "recipe &lt;int8&gt;" in page and "int4-rtn" in page and "1.50" in page
    rtn = data["engines"][1]
    told = summary(found)
    assert "int4-rtn" in told and "7.00" in told
    if acted:
        assert rtn["lost_points"] == 5.0 and rtn["only_full_precision"] == 5 and rtn["lost_points_at_most"] > 5
        assert "5.00" in page and "5.00" in told and data["full_precision_successes"] == 50
    else:
        assert rtn["lost_points"] is None and "Success %" not in page and math.isclose(rtn["bits"], 4.5)


def test_the_benchmark_leaves_rows_that_the_next_run_goes_on_from(tmp_path, monkeypatch, capsys):
    from benchmarks import compress

    from vla_edge.engine import build
    from vla_edge.evaluate import comparison

    reference = {seed: seed % 2 == 0 for seed in range(100)}
    monkeypatch.setattr(compress, "DIRECTORY", tmp_path)
    write = compress.write
    monkeypatch.setattr(compress, "write", lambda name, rows: write(name, rows, tmp_path))
    monkeypatch.setattr(build, "build", lambda *arguments, **settings: tmp_path / "bundle")

    def compare(checkpoint, bundles, *rest):
        made = (contender(name, 0.015, 3.4, reference, reference) for name in bundles)
        return Comparison("g1_tabletop", "hard", reference, tuple(made))

    monkeypatch.setattr(comparison, "compare_engines", compare)
    for recipe in ("int8", "int4-rtn"):
        assert compress.main(["--recipes", recipe, "--episodes", "100"]) == 0
    rows = {row.name: row for row in compress.read(tmp_path / "compress.json")}
    assert rows["success_drop_points.int8"].value == 0.0 and rows["success_drop_points.int4-rtn"].n == 100
    assert (tmp_path / "recipes.html").is_file() and "int4-rtn" in capsys.readouterr().out
