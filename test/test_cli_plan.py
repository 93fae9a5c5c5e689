"""`vla-edge plan`: what it prints, as text and as JSON, and how it fails."""

from __future__ import annotations

import json

import pytest

from vla_edge.cli import main

ORIN = ["plan", "openvla-7b", "--device", "agx-orin-64gb", "--runtime", "fused", "--group-size", "128"]


def printed(capsys, *arguments, code: int = 0):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def test_a_plan_shows_its_arithmetic(capsys):
    text = printed(capsys, *ORIN, "--recipe", "int4-gptq").out
    for word in ("vision", "prefill", "decode", "chunks/s", "actions/s", "language body 3.41 GB", "bottleneck"):
        assert word in text
    told = json.loads(printed(capsys, *ORIN, "--recipe", "int4-gptq", "--json").out)
    stages = told["stages"]
    total = sum(stage["calls"] * stage["call_ms"] for stage in stages.values()) + told["host_ms"]
    assert told["total_ms"] == pytest.approx(total) and stages["decode"]["calls"] == 6
    assert told["bytes"]["weights"]["language body"] == 6_607_339_520 * (0.5 + 2 / 128)


def test_options_change_the_plan(capsys):
    plain = json.loads(printed(capsys, *ORIN, "--recipe", "bf16", "--json").out)
    less = json.loads(
        printed(capsys, *ORIN, "--recipe", "bf16", "--keep-vision", 0.5, "--kv", "int8", "--chunk", 2, "--json").out
    )
    assert less["stages"]["prefill"]["ms"] < plain["stages"]["prefill"]["ms"]
    assert less["stages"]["decode"]["calls"] == 13
    assert less["bytes"]["cache"] < plain["bytes"]["cache"] / 2


def test_a_target_lists_what_reaches_it_and_its_code_says_whether_anything_does(capsys):
    text = printed(capsys, *ORIN, "--target-hz", 4).out
    assert "combinations reach 4 chunks/s" in text and "no FP8 products" in text and "w4a8" in text
    assert "autoregressive" in next(line for line in text.splitlines() if "w4a8" in line)
    told = json.loads(printed(capsys, *ORIN, "--target-hz", 4, "--json").out)
    reached = [entry for entry in told["candidates"] if entry["reaches"]]
    assert reached and all(entry["plan"]["chunk_rate_hz"] >= 4 for entry in reached)
    text = printed(capsys, *ORIN, "--target-hz", 400, code=1).out
    assert "nothing reaches 400 chunks/s; the fastest is" in text and "It waits for" in text


def test_a_checkpoint_is_planned_like_a_published_policy(capsys):
    from vla_edge.resources import shipped_checkpoint

    command = ("plan", shipped_checkpoint(), "--device", "rtx-4090", "--json", "--recipe")
    told = json.loads(printed(capsys, *command, "bf16").out)
    assert told["architecture"] == "g1_tabletop" and told["stages"]["denoise"]["calls"] == 10
    # a recipe that trains for fewer flow steps is planned with them
    assert json.loads(printed(capsys, *command, "two-step").out)["stages"]["denoise"]["calls"] == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["plan", "openvla7b", "--device", "h200"], "did you mean 'openvla-7b'"),
        (["plan", "pi0", "--device", "orin"], "there is no device 'orin'"),
        (["plan", "pi0", "--device", "agx-orin-64gb", "--recipe", "fp8"], "no FP8 products"),
        (["plan", "pi0", "--device", "h200", "--recipe", "int9"], "there is no recipe 'int9'"),
        (["plan", "pi0", "--device", "h200", "--recipe", "bf16", "--keep-vision", "2"], "keep_vision is 2.0"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_code_2(capsys, arguments, words):
    assert words in printed(capsys, *arguments, code=2).err
