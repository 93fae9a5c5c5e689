"""The report of a closed-loop run: how often it did what it was told, with what certainty, and where it failed."""

from __future__ import annotations

import math
from pathlib import Path

from vla_edge.evaluate.closed_loop_result import ClosedLoopResult
from vla_edge.evaluate.metrics import wilson_interval
from vla_edge.evaluate.page import Page, subheading, table, two, write_json
from vla_edge.evaluate.verdict import Verdict, check

FOOTER = (
    "Episodes run on a virtual clock through the robot's own observation, engine and controller; success is judged by "
    "the state of the simulated world. Intervals are Wilson's at 95 %. This file needs no network."
)


def judge_closed_loop(
    result: ClosedLoopResult,
    shuffled: ClosedLoopResult | None = None,
    min_success: float = 0.95,
    max_wrong_first: float = 0.03,
    max_over_chance: float = 0.05,
) -> Verdict:
    """Applies the limits of a policy's acceptance.

    Args:
        shuffled: a run whose instructions name another goal: the scene's own goal must then be reached no more often
            than by chance plus `max_over_chance`, and the goal given as often as `min_success` asks.
    """
    low, high = 100 * result.wilson.low, 100 * result.wilson.high
    checks = [
        check(
            "success_rate",
            result.success_rate,
            "",
            ">=",
            min_success,
            f"{result.successes} of {result.n} episodes succeeded ({100 * result.success_rate:.1f} %, 95 % interval "
            f"{low:.1f} to {high:.1f}); {100 * min_success:g} % have to.",
        ),
    ]
    if result.choice:
        checks.append(
            check(
                "wrong_first_rate",
                result.wrong_first_rate,
                "",
                "<=",
                max_wrong_first,
                f"The wrong object was touched first in {result.wrong_first} of {result.n} episodes; "
                f"{100 * max_wrong_first:g} % may be.",
            )
        )
    if shuffled is not None:
        limit = shuffled.chance + max_over_chance
        checks += [
            check(
                "shuffled_true_goal_rate",
                shuffled.success_rate,
                "",
                "<=",
                limit,
                f"Given another instruction, the scene's own goal was reached in {shuffled.successes} of {shuffled.n} "
                f"episodes; chance is {100 * shuffled.chance:.1f} %, {100 * limit:.1f} % are allowed.",
            ),
            check(
                "shuffled_given_goal_rate",
                shuffled.given_success_rate,
                "",
                ">=",
                min_success,
                f"The goal that was given instead was reached in {shuffled.given_successes} of {shuffled.n} episodes; "
                f"{100 * min_success:g} % have to be, or the policy does not listen.",
            ),
        ]
    return Verdict(tuple(checks))


def write_closed_loop_report(
    result: ClosedLoopResult,
    path: str | Path,
    name: str = "Policy",
    shuffled: ClosedLoopResult | None = None,
    **limits: float,
) -> tuple[Path, Path]:
    """Writes `path` (HTML) and the same name ending in .json; returns both. `limits` as in `judge_closed_loop`."""
    verdict = judge_closed_loop(result, shuffled, **limits)
    options = result.options
    page = Page(
        f"{name} in closed loop",
        f"{result.n} episodes of {options['world']}, tier {options['tier']}, {options['rate_hz']:g} observations a "
        f"second, chunks {1e3 * options['delay_s']:.0f} ms late, inference {options['inference']}",
    )
    page.verdict(verdict)
    summary = result.summary()
    seconds, smooth, unit = summary["median_seconds"], result.smoothness, result.unit
    wrong_first = [
        ("Wrong first", f"{100 * result.wrong_first_rate:.1f}", "%", _interval(result.wrong_first, result.n))
    ] * result.choice
    page.cards(
        [
            ("Success", f"{100 * result.success_rate:.1f}", "%", _interval(result.successes, result.n)),
            *wrong_first,
            ("Time to success", f"{seconds:.1f}" if seconds else "–", "s", "median, world time"),
            ("Chunks", str(summary["chunks"]), "", f"{summary['rejected_chunks']} rejected by the controller"),
            ("Between plans", _figure(1e3 * smooth.plan_step_p99), f"m{unit}", "apart where one takes over, p99"),
            ("Jerk", _figure(smooth.jerk_rms), f"{unit}/s³", "rms of the command"),
        ]
    )
    goals = result.by_goal()
    bars = page.chart(
        "goals",
        "bars",
        "Success by goal",
        names=list(goals),
        values=[round(100 * k / n, 2) for k, n in goals.values()],
        unit="% of its episodes",
    )
    rows = [(goal, f"{k} of {n}", _interval(k, n)) for goal, (k, n) in goals.items()]
    page.section(
        "By goal",
        "A goal that stands out is where more demonstrations, or more bits, would help.",
        two(bars, table(("Goal", "Success", "Interval"), rows, numeric=(1, 2))),
    )
    failures = [row for row in result.rows if not row.success]
    if failures:
        page.section("Failures", "Each can be run again alone: an episode is decided by its seed.", _rows(failures))
    page.section("All episodes", "In the order of their seeds.", _rows(result.rows))
    if shuffled is not None:
        page.section(
            "With shuffled instructions",
            "The policy is told a goal of the scene that is not the scene's own.",
            subheading(shuffled.one_line()),
            _rows(shuffled.rows),
        )
    html = page.write(path, FOOTER)
    content = {"name": name, "passed": verdict.passed, "checks": verdict.checks, **result.to_dict()}
    if shuffled is not None:
        content["shuffled"] = shuffled.to_dict()
    return html, write_json(Path(path).with_suffix(".json"), content)


def _rows(rows) -> str:
    def outcome(row) -> str:
        return "success" if row.given_success else "wrong first" if row.wrong_first else "time ran out"

    return table(
        ("Seed", "Instruction", "Outcome", "Seconds", "Chunks"),
        ((row.seed, row.instruction, outcome(row), f"{row.seconds:.2f}", row.chunks) for row in rows),
        numeric=(0, 3, 4),
    )


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _interval(successes: int, n: int) -> str:
    interval = wilson_interval(successes, n)
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"
