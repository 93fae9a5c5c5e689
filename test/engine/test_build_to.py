"""A build towards a target, for real: engines are built and measured, and what reaches it is written with its page."""

from __future__ import annotations

import json

import pytest

from vla_edge.cli import main
from vla_edge.engine import build_to as building
from vla_edge.engine.alone import cold_start, most_memory
from vla_edge.engine.backends import BackendError
from vla_edge.engine.build_to import build_to, report_path
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.runner import Runner
from vla_edge.engine.target import Draft, Target
from vla_edge.evaluate.target_report import summary


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(building, "REPEATS", 10)


def test_the_first_engine_that_reaches_the_target_is_written(checkpoint, data, tmp_path):
    output = tmp_path / "engine"
    outcome, path = build_to(checkpoint, Target(rate_hz=0.5), "onnxruntime", output, data)
    assert outcome.reached and path == output.resolve() and outcome.best.draft == Draft()
    bundle = Bundle.load(path)
    assert bundle.manifest["recipe"]["accept"] == {"action_error_rel": 0.03}
    assert Runner.from_bundle(path).infer(data.held_out[0]).chunk.positions.shape[1] == len(bundle.spec.joint_names)
    written = json.loads(output.with_suffix(".json").read_text())
    assert written["reached"] and written["attempts"][0]["memory_bytes"] == outcome.best.memory_bytes > 20e6
    assert "fp32" in report_path(output).read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["engine", "engine.html", "engine.json"]


def test_out_of_reach_says_what_is_in_the_way_and_goes_on_where_it_was(checkpoint, data, tmp_path, monkeypatch):
    target, output = Target(rate_hz=1e5, action_error_rel=5.0), tmp_path / "engine"
    outcome, path = build_to(checkpoint, target, "onnxruntime", output, data, most=2)
    assert path is None and not output.exists() and len(outcome.attempts) == 2
    assert outcome.bottleneck and outcome.lever in summary(outcome)
    assert "not reached" in report_path(output).read_text()

    def never(*_, **__):
        raise AssertionError("what was measured is measured again")

    monkeypatch.setattr(building, "profile_bundle", never)
    again, _ = build_to(checkpoint, target, "onnxruntime", output, data, most=2)
    assert again == outcome


def test_what_cannot_be_built_is_an_attempt_that_failed(checkpoint, data, tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise BackendError("this runtime has no such products")

    monkeypatch.setattr(building, "build", refuses)
    outcome, path = build_to(checkpoint, Target(rate_hz=1), "onnxruntime", tmp_path / "engine", data, most=3)
    assert path is None and outcome.best is None
    assert {attempt.failure for attempt in outcome.attempts} == {"this runtime has no such products"}
    assert "no engine could be built" in summary(outcome)


def test_an_engine_alone_tells_its_memory_and_its_start(bundle):
    opened = Bundle.load(bundle)
    assert 20e6 < most_memory(opened, idle=True) < most_memory(opened) < 4e9
    assert 0.1 < cold_start(bundle) < 60
    with pytest.raises(BackendError, match="does not run in a process of its own: .*BundleError"):
        cold_start(bundle / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-error", "0.1"], "--max-error belongs to --target-hz"),
        (["--target-hz", "5", "--recipe", "int8"], "--recipe does not go with a target"),
        (["--target-hz", "0"], "rate_hz is 0"),
        (["--target-hz", "5", "--backend", "nothing"], "nothing"),
    ],
)
def test_arguments_that_do_not_go_together_are_errors(checkpoint, capsys, arguments, told):
    assert main(["build", str(checkpoint), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_the_command_builds_towards_a_target(checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(building, "load_calibration", lambda *_: data)
    monkeypatch.setattr(building, "calibration_source", lambda *_: data)
    output = tmp_path / "engine"
    arguments = ["build", str(checkpoint), "--backend", "onnxruntime", "--output", str(output), "--json"]
    assert main([*arguments, "--target-hz", "0.5", "--max-memory-mb", "100000"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reached"] and told["bundle"] == str(output.resolve())
