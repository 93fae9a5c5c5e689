"""Several engines on several recordings on one page: who passes, what each costs, and which are worth having."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from vla_edge.evaluate.markdown import table as markdown_table
from vla_edge.evaluate.page import Page, folded, mrad, subheading, table, text, write_json, write_text
from vla_edge.evaluate.report import to_json, write_report
from vla_edge.evaluate.suite import Outcome
from vla_edge.evaluate.verdict import Check, Verdict

FOOTER = (
    "Every engine on every recording by itself, through the code that runs on the robot. Latencies are of the machine "
    "that wrote this page, with as many evaluations at a time as were asked for. This file needs no network."
)


def write_suite_report(outcomes: Sequence[Outcome], path: str | Path) -> tuple[Path, ...]:
    """Writes `path` (HTML), .json and .md beside it, and a page of its own for every pair in a folder beside them."""
    path = Path(path)
    engines, bags = list(dict.fromkeys(o.engine for o in outcomes)), list(dict.fromkeys(o.bag for o in outcomes))
    page = Page(
        f"{f'{len(engines)} engines' if len(engines) > 1 else engines[0]} on {len(bags)} recordings",
        f"{sum(o.evaluation.frames for o in outcomes if o.evaluation)} frames evaluated",
    )
    page.verdict(verdict_of(outcomes))
    done = [o for o in outcomes if o.evaluation is not None]
    pages = [_page_of(outcome, path) for outcome in done]
    if done:
        points = [_pooled([o for o in done if o.engine == engine]) for engine in engines]
        kept = [(engine, point) for engine, point in zip(engines, points) if point is not None]
        compared = all(math.isfinite(point[1]) for _, point in kept)
        page.section(
            "Error against time",
            "Each point is an engine, over all recordings. On the line are those that no other beats in both.",
            page.chart(
                "pareto", "scatter", "Error against latency",
                names=[engine for engine, _ in kept],
                x=[round(point[0], 3) for _, point in kept],
                y=[round(1e3 * point[1 if compared else 2], 4) for _, point in kept],
                unitX="ms, p50", unitY="mrad from full precision" if compared else "mrad from what the robot did",
            ),
        )  # fmt: skip
    columns = ("Engine", "Recording", "Verdict", "Action error, mrad", "Of the motion", "p50, ms", "p99, ms", "Frames")
    rows = [_row(o) for o in outcomes]
    page.section("Every pair", "Each has a page of its own beside this one.", table(columns, rows, range(3, 8)))
    links = "".join(
        f'<li><a href="{text(file.relative_to(path.parent).as_posix())}">{text(o.engine)} on {text(o.bag)}</a></li>'
        for o, file in zip(done, pages)
    )
    errors = [(o.engine, o.bag, o.error) for o in outcomes if o.error]
    page.section(
        "Pages",
        "",
        f"<ul>{links}</ul>",
        subheading("Not evaluated") + table(("Engine", "Recording", "Why"), errors) if errors else "",
    )
    failing = [(o.engine, o.bag, c.sentence) for o in done for c in o.verdict.checks if not c.passed]
    if failing:
        page.section("What fails", "", folded(f"{len(failing)} limits", table(("Engine", "Recording", "Why"), failing)))
    html = page.write(path, FOOTER)
    json = write_json(path.with_suffix(".json"), suite_json(outcomes))
    lines = [f"# {verdict_of(outcomes).headline}", "", *markdown_table(columns, rows)]
    markdown = write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")
    return html, json, markdown, *pages


def suite_json(outcomes: Sequence[Outcome]) -> dict:
    """What stands beside the page."""
    content = [
        {"engine": o.engine, "bag": o.bag, "passed": o.passed, "error": o.error}
        | ({"evaluation": to_json(o.evaluation, o.verdict)} if o.evaluation is not None else {})
        for o in outcomes
    ]
    return {"passed": all(o.passed for o in outcomes), "outcomes": content}


def verdict_of(outcomes: Sequence[Outcome]) -> Verdict:
    """One check for every pair."""
    checks = []
    for outcome in outcomes:
        failed = [c.name for c in outcome.verdict.checks if not c.passed] if outcome.verdict else []
        told = f"fails {', '.join(failed)}." if failed else "holds every limit."
        told = f"could not be evaluated: {outcome.error}" if outcome.error else told
        name, broken = f"{outcome.engine} on {outcome.bag}", len(failed) + bool(outcome.error)
        checks.append(Check(name, broken, "", "<=", 0, outcome.passed, f"{name} {told}"))
    return Verdict(tuple(checks), "pairs")


def _page_of(outcome: Outcome, path: Path) -> Path:
    name = f"{outcome.engine}-on-{outcome.bag}".replace("/", "_")
    return write_report(outcome.evaluation, path.with_suffix("") / f"{name}.html", outcome.verdict)[0]


def _pooled(outcomes: Sequence[Outcome]) -> tuple[float, float, float] | None:
    """(ms, rad from full precision, rad from what the robot did) of an engine over its recordings, by frames."""
    found = [o.evaluation for o in outcomes]
    frames = sum(e.frames for e in found)
    if not frames:
        return None

    def mean(values) -> float:
        return sum(value * e.frames for value, e in zip(values, found)) / frames

    apart = mean([e.compression.error.mean if e.compression else math.nan for e in found])
    return mean([e.latency_ms.p50 for e in found]), apart, mean([e.action.mean for e in found])


def _row(outcome: Outcome) -> tuple:
    found = outcome.evaluation
    if found is None:
        return outcome.engine, outcome.bag, "not evaluated", "–", "–", "–", "–", 0
    verdict = "passes" if outcome.passed else outcome.verdict.headline
    relative = f"{100 * found.compression.relative:.2f} %" if found.compression else "–"
    latency = found.latency_ms
    return (
        outcome.engine, outcome.bag, verdict, mrad(found.action.mean), relative, f"{latency.p50:.1f}",
        f"{latency.p99:.1f}", found.frames,
    )  # fmt: skip
