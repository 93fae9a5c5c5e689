"""The `vla-edge` command from end to end on a tiny robot: what it prints, as text and as JSON, and how it fails."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vla_edge.cli import main
from vla_edge.progress import Bar

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from tiny import WORDS, make_observations, tiny_policy, tiny_spec  # noqa: E402


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """A directory with `checkpoint` and `calibration` beside each other, as one is shipped."""
    from vla_edge.evaluate.bag_writer import BagWriter
    from vla_edge.policy.checkpoint_writer import write_checkpoint

    directory = tmp_path_factory.mktemp("robots") / "tiny"
    write_checkpoint(directory / "checkpoint", tiny_policy(), tiny_spec(), WORDS)
    with BagWriter(directory / "calibration") as writer:
        for index, observation in enumerate(make_observations(48)):
            if index % 6 == 0:
                writer.instruction(observation.stamp_ns, observation.instruction)
            for delay_ns in (0, 100_000_000):
                writer.joints(replace(observation.joints, stamp_ns=observation.stamp_ns + delay_ns))
            writer.image(observation.stamp_ns, "head", observation.images["head"])
    return directory


@pytest.fixture(scope="module")
def bundle(robot):
    """Built by the command itself, with nothing but the checkpoint named."""
    assert main(["build", str(robot / "checkpoint")]) == 0
    return robot / "bundles" / "int8-auto"


def printed(capsys, *arguments, code: int = 0):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def test_build_says_what_came_of_it_and_does_not_do_it_twice(robot, bundle, capsys):
    text = printed(capsys, "build", robot / "checkpoint")
    assert str(bundle) in text and "% of the motion" in text and "\n" not in text.strip()
    told = json.loads(printed(capsys, "build", robot / "checkpoint", "--json"))
    assert told["bundle"] == str(bundle) and told["verification"]["action_error_rel"] < 0.03
    assert told["recipe"]["name"] == "int8" and "layers" not in told["stages"]["vision"]


def test_inspect_lists_stages_and_layers(bundle, capsys):
    text = printed(capsys, "inspect", bundle, "--layers")
    for word in ("smolvla, 3 joints", "every hash is right", "100 % int8", "encoder.layers.0.mlp.up", "head 48x32"):
        assert word in text
    assert "kB from prefix to denoise" in text
    told = json.loads(printed(capsys, "inspect", bundle, "--json"))
    assert told["stages"]["denoise"]["layers"]["action_out"]["weights"] == "int8"


def test_evaluate_compares_with_the_recording_and_the_reference(robot, bundle, tmp_path, capsys):
    arguments = ["evaluate", robot / "calibration", bundle, "--reference", robot / "checkpoint", "--max-frames", 6]
    arguments += ["--report", tmp_path / "report.html"]
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    told = json.loads(capsys.readouterr().out)
    # a policy of random weights does not imitate anybody; the command then says so by its code
    assert code == (0 if told["passed"] else 1)
    assert told["frames"] == 6 and told["compression"]["relative"] < 0.03
    assert (tmp_path / "report.html").exists() and (tmp_path / "report.json").exists()


def test_bench_times_engines_in_turn(robot, bundle, capsys):
    told = json.loads(printed(capsys, "bench", robot / "checkpoint", bundle, "--rounds", 3, "--json"))
    assert told["base"] == "checkpoint" and [row["engine"] for row in told["rows"]] == ["checkpoint", bundle.name]
    assert told["rows"][0]["speedup"] == 1.0 and told["rows"][1]["ms"]["denoise"]["n"] == 3
    assert "times checkpoint" in printed(capsys, "bench", robot / "checkpoint", bundle, "--rounds", 2)


def test_closed_loop_counts_successes(monkeypatch, bundle, capsys):
    from vla_edge.evaluate import closed_loop
    from vla_edge.evaluate.closed_loop_result import ClosedLoopResult
    from vla_edge.evaluate.metrics import wilson_interval

    asked = {}

    def run(engine, seeds, tier, override, delay, rate, workers, progress, inference, until, world):
        assert until is None and inference == "asynchronous"
        asked.update(engine=engine, seeds=list(seeds), world=world, tier=tier, override=override, delay=delay)
        return ClosedLoopResult(4, 3, wilson_interval(3, 4), 3, 1, 0.125, {"tier": tier}, ())

    monkeypatch.setattr(closed_loop, "run_closed_loop", run)
    text = printed(capsys, "closed-loop", bundle, "--episodes", 4, "--first-seed", 9, "--shuffled", "--delay", 0.2)
    assert "3 of 4 episodes succeeded (75.0 %" in text and "chance is 12.5 %" in text
    assert asked == {
        "engine": bundle, "seeds": [9, 10, 11, 12], "world": "tabletop", "tier": None, "override": "shuffled",
        "delay": 0.2,
    }  # fmt: skip
    assert json.loads(printed(capsys, "closed-loop", bundle, "--json"))["result"]["successes"] == 3


def test_closed_loop_stops_when_it_is_certain_and_says_on_which_side(monkeypatch, capsys):
    from types import SimpleNamespace

    from vla_edge.evaluate import closed_loop
    from vla_edge.evaluate.closed_loop_result import ClosedLoopResult
    from vla_edge.evaluate.metrics import wilson_interval

    def run(engine, seeds, tier, override, delay, rate, workers, progress, inference, until, world):
        ended = next(n for n, _ in enumerate(seeds, 1) if until(SimpleNamespace(success=False)))
        return ClosedLoopResult(ended, 0, wilson_interval(0, ended), 0, 0, 0.125, {"tier": tier}, ())

    monkeypatch.setattr(closed_loop, "run_closed_loop", run)
    text = printed(capsys, "closed-loop", "engine", "--stop-at", 0.9, code=1)
    assert "certainly below 90 %" in text
    assert main(["closed-loop", "engine", "--stop-at", "2"]) == 2
    assert "have to lie between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (None, 0), (False, 1)])
def test_closed_loop_in_pairs_ends_with_its_answer(monkeypatch, capsys, holds, code):
    from vla_edge.evaluate import paired_run
    from vla_edge.evaluate.closed_loop_result import ClosedLoopResult
    from vla_edge.evaluate.metrics import wilson_interval

    asked = {}

    def run(first, second, seeds, margin, **options):
        asked.update(options, first=str(first), second=str(second), seeds=list(seeds), margin=margin)
        result = ClosedLoopResult(2, 1, wilson_interval(1, 2), 1, 0, 0.125, {"tier": "hard"}, ())
        return paired_run.PairedRun(result, result, margin, holds, 0.95)

    monkeypatch.setattr(paired_run, "run_paired", run)
    arguments = ["closed-loop", "engine", "--against", "checkpoint", "--margin", 0.02]
    arguments += ["--episodes", 2, "--tier", "hard"]
    assert "1 of 2 against 1 on the same seeds" in printed(capsys, *arguments, code=code)
    assert (asked["first"], asked["second"], asked["margin"], asked["tier"]) == ("checkpoint", "engine", 0.02, "hard")
    assert asked["seeds"] == [100_000, 100_001]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "there is no bundle"),
        (["build", "nowhere"], "there is no checkpoint directory"),
        (["evaluate", "nowhere.mcap", "nowhere"], "nowhere"),
        (["distill", "nowhere", "student", "--demonstrations", "shown"], "there is no checkpoint directory"),
        (["draft", "nowhere", "--demonstrations", "shown"], "there is no checkpoint directory"),
        (["bench", "nowhere"], "nowhere"),
    ],
)
def test_an_error_is_one_sentence_and_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    *progress, sentence = captured.err.splitlines()
    assert sentence.startswith("vla-edge: ") and message in sentence and not captured.out
    assert all("%" in line for line in progress)


def test_a_recipe_that_does_not_exist_is_named(robot, capsys):
    assert main(["build", str(robot / "checkpoint"), "--recipe", "int88"]) == 2
    assert "did you mean 'int8'" in capsys.readouterr().err


def test_an_altered_bundle_is_refused(bundle, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy")
    with (copy / "denoise.onnx").open("ab") as file:
        file.write(b"\0")
    assert main(["inspect", str(copy)]) == 2
    assert "denoise.onnx is not the file that was built" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "distill", "draft", "inspect", "evaluate", "closed-loop", "bench"])
def test_every_command_has_help_and_json(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_redrawn_in_a_terminal_and_a_line_a_step_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen, log = Terminal(), io.StringIO()
    for stream in (screen, log):
        bar = Bar(stream)
        for fraction in (0.0, 0.25, 0.5):
            bar(fraction, "calibrating")
        bar(0.75, "comparing")
        bar.close()
    assert screen.getvalue().count("\r") == 5 and "\n" not in screen.getvalue() and " 75 %" in screen.getvalue()
    assert [line.split()[-1] for line in log.getvalue().splitlines()] == ["calibrating", "comparing"]


def test_the_bar_says_how_much_longer_and_is_not_misled_by_what_was_done_before(monkeypatch):
    now, log = [0.0], io.StringIO()
    monkeypatch.setattr("vla_edge.progress.time.monotonic", lambda: now[0])
    bar = Bar(log)
    for seconds, fraction, step in ((0, 0.0, "reading"), (1, 0.5, "resumed"), (601, 0.54, "part a"), (1201, 0.58, "part b")):
        now[0] = seconds
        bar(fraction, step)
    lines = log.getvalue().splitlines()
    assert "left" not in lines[0] and "left" not in lines[1]
    assert "115 min left" in lines[2] and "105 min left" in lines[3]


@pytest.mark.parametrize(("budget", "key", "limit"), [("--bits", "average_bits", 9), ("--ms", "predicted_ms", 1000)])
def test_sensitivity_writes_a_recipe_that_builds_and_its_report(robot, tmp_path, capsys, budget, key, limit):
    recipe = tmp_path / "found.yaml"
    command = ("sensitivity", robot / "checkpoint", budget, str(limit), "--frames", "2", "--output", recipe, "--json")
    told = json.loads(printed(capsys, *command))
    assert told[key] <= limit and told["layers"]
    assert told["measured_error_rel"] > 0 if budget == "--bits" else told["layers"].keys() == {"float32"}
    assert (told["measured_ms"] or 0) > 0 if budget == "--ms" else told["measured_ms"] is None
    assert {file.name for file in tmp_path.iterdir()} == {"found.yaml", "found.html", "found.json"}
    assert "sensitivity by layer" in recipe.with_suffix(".html").read_text()
    printed(capsys, "build", robot / "checkpoint", "--recipe", recipe, "--output", tmp_path / "bundle")
    told = json.loads(printed(capsys, "inspect", tmp_path / "bundle", "--json"))
    assert told["recipe"]["name"] == "found"


def test_a_budget_that_cannot_be_kept_is_one_sentence(robot, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    command = ("sensitivity", robot / "checkpoint", "--bits", "3", "--frames", "1", "--output", recipe)
    assert main([str(argument) for argument in command]) == 2
    assert "cannot be kept to" in capsys.readouterr().err
    assert main([*(str(argument) for argument in command), "--frames", "0"]) == 2
    assert "at least one observation" in capsys.readouterr().err
    assert not recipe.exists()
