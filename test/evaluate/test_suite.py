"""Several engines on several recordings: outcomes, JUnit, Markdown and one page for all."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from vla_edge.cli import main
from vla_edge.evaluate.bag_writer import BagWriter
from vla_edge.evaluate.limits import Limits, LimitsError
from vla_edge.evaluate.suite import Job, run_suite, short_names

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from tiny import WORDS, make_observations, tiny_policy, tiny_spec  # noqa: E402

# What a policy of random weights cannot be held to.
LENIENT = "error_over_hold: null\nlatency_p99_ms: 1000000\nstaleness_p99_ms: 1000000\nserved_fraction: null\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Directory with `policy`, a checkpoint, and `one` and `two`, recordings for it."""
    from vla_edge.policy.checkpoint_writer import write_checkpoint

    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory / "policy", tiny_policy(), tiny_spec(), WORDS)
    for seed, name in enumerate(("one", "two")):
        with BagWriter(directory / name) as writer:
            for index, observation in enumerate(make_observations(12, seed)):
                if index % 6 == 0:
                    writer.instruction(observation.stamp_ns, observation.instruction)
                for delay_ns in (0, 100_000_000):
                    writer.joints(replace(observation.joints, stamp_ns=observation.stamp_ns + delay_ns))
                writer.image(observation.stamp_ns, "head", observation.images["head"])
    return directory


def evaluate(tiny, tmp_path, limits, *more) -> int:
    file = tmp_path / "accept.yaml"
    file.write_text(limits)
    reference = ["--reference", tiny / "policy", "--accept", file, "--junit", tmp_path / "junit.xml"]
    return main([str(word) for word in ("evaluate", *more, *reference)])


def test_acceptance_ends_with_0_where_every_limit_holds_and_1_where_one_breaks(tiny, tmp_path, capsys):
    assert evaluate(tiny, tmp_path, LENIENT, tiny / "one", tiny / "policy") == 0
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["policy on one"]
    assert "action_error_rel" in {case.get("name") for case in suites.iter("testcase")}
    assert not list(suites.iter("failure"))
    capsys.readouterr()
    strict = LENIENT.replace("error_over_hold: null", "error_over_hold: 0.001")
    assert evaluate(tiny, tmp_path, strict, tiny / "one", tiny / "policy") == 1
    assert "Fails 1 of" in capsys.readouterr().out.splitlines()[0]
    cases = ElementTree.parse(tmp_path / "junit.xml").iter("testcase")
    failures = [case for case in cases if case.find("failure") is not None]
    assert [case.get("name") for case in failures] == ["error_over_hold"]
    assert "times that of standing still" in failures[0].find("failure").text


def test_pairs_in_parallel_give_what_they_give_alone(tiny, tmp_path, capsys):
    together = ["--bag", tiny / "one", tiny / "two", "--engine", tiny / "policy", "--report", tmp_path / "all.html"]
    assert evaluate(tiny, tmp_path, LENIENT, *together, "--workers", 2) == 0
    told = json.loads((tmp_path / "all.json").read_text())
    assert [(o["engine"], o["bag"], o["passed"]) for o in told["outcomes"]] == [
        ("policy", "one", True), ("policy", "two", True),
    ]  # fmt: skip
    jobs = [Job(str(tiny / bag), str(tiny / "policy"), str(tiny / "policy"), threads=1) for bag in ("one", "two")]
    for alone, outcome in zip(run_suite(jobs), told["outcomes"]):
        assert outcome["evaluation"]["action_mae_rad"] == pytest.approx(alone.evaluation.action_mae_rad, rel=1e-6)
    pages = {path.name for path in (tmp_path / "all").glob("*.html")}
    assert pages == {"policy-on-one.html", "policy-on-two.html"}
    assert "| policy | two | passes |" in (tmp_path / "all.md").read_text()
    for page in pages:
        assert f'href="all/{page}"' in (tmp_path / "all.html").read_text()


def test_a_pair_that_cannot_be_evaluated_leaves_the_others_alone(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    more = ["--bag", tmp_path / "empty", tiny / "two", "--engine", tiny / "policy"]
    assert evaluate(tiny, tmp_path, LENIENT, *more) == 1
    first, second = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (first.get("errors"), second.get("errors"), second.get("failures")) == ("1", "0", "0")
    assert "cannot be read" in first.find("testcase/error").get("message")


def test_a_single_pair_that_cannot_be_evaluated_is_one_sentence_and_code_2(tiny, tmp_path, capsys):
    assert evaluate(tiny, tmp_path, LENIENT, tmp_path / "nowhere", tiny / "policy") == 2
    assert "vla-edge: there is no bag at" in capsys.readouterr().err
    assert main(["evaluate", str(tiny / "one")]) == 2
    assert "no engine to evaluate" in capsys.readouterr().err


def test_engine_and_reference_of_other_joints_are_told_apart(tiny, tmp_path, capsys):
    from vla_edge.resources import shipped_checkpoint

    assert main(["evaluate", str(tiny / "one"), str(tiny / "policy"), "--reference", str(shipped_checkpoint())]) == 2
    assert "differ in joints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("action_eror_rel: 0.1", "did you mean 'action_error_rel'"),
        ("action_error_rel: yes", "must be a number from 0 up"),
        ("action_error_rel: -1", "must be a number from 0 up"),
        ("- action_error_rel", "must map figures to limits"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_of_limits_that_makes_no_sense_is_refused(tmp_path, text, says):
    path = tmp_path / "accept.yaml"
    path.write_text(text)
    with pytest.raises(LimitsError, match=says):
        Limits.load(path)


def test_limits_that_are_left_out_keep_their_defaults(tmp_path):
    path = tmp_path / "accept.yaml"
    path.write_text("action_error_rel: 0.1\nerror_over_hold: null\n")
    assert Limits.load(path) == Limits(action_error_rel=0.1, error_over_hold=None)


def test_names_are_as_short_as_they_can_be_told_apart():
    assert short_names(["/a/x/int8", "/a/y/int8", "/b/fp32"]) == {
        "/a/x/int8": "x/int8", "/a/y/int8": "y/int8", "/b/fp32": "fp32",
    }  # fmt: skip


def test_without_dask_the_flag_says_what_is_missing(tiny, monkeypatch):
    from vla_edge.evaluate.suite import SuiteError

    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SuiteError, match="needs the package distributed"):
        run_suite([Job(str(tiny / "one"), str(tiny / "policy"))], dask="tcp://127.0.0.1:1")


@pytest.mark.peers
def test_a_dask_cluster_gives_what_this_process_gives(tiny):
    distributed = pytest.importorskip("distributed")
    jobs = [Job(str(tiny / bag), str(tiny / "policy"), threads=1) for bag in ("one", "two")]
    seen = []
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        outcomes = run_suite(jobs, dask=cluster.scheduler_address, progress=lambda done, _: seen.append(done))
    assert seen == [0.5, 1.0]
    for there, here in zip(outcomes, run_suite(jobs)):
        assert there.evaluation.action.per_joint == pytest.approx(here.evaluation.action.per_joint, rel=1e-6)
        assert (there.bag, there.evaluation.frames) == (here.bag, here.evaluation.frames)


@pytest.mark.peers
def test_a_scheduler_that_is_not_there_is_named(tiny):
    pytest.importorskip("distributed")
    from vla_edge.evaluate.suite import SuiteError

    with pytest.raises(SuiteError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        run_suite([Job(str(tiny / "one"), str(tiny / "policy"))], dask="tcp://127.0.0.1:9")
