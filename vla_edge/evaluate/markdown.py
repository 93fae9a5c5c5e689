"""The figures of a replay as Markdown, for a pull request or a log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vla_edge.evaluate.evaluation import Evaluation
from vla_edge.evaluate.page import mrad, write_text
from vla_edge.evaluate.verdict import Verdict


def write_markdown(evaluation: Evaluation, verdict: Verdict, path: str | Path) -> Path:
    """Writes the verdict and the tables people quote."""
    action, latency = evaluation.action, evaluation.latency_ms
    lines = [
        f"# {evaluation.engine.get('name', 'Engine')} on {evaluation.bag}: {verdict.headline}",
        "",
        f"{evaluation.frames} frames of {evaluation.duration_s:.1f} s.",
        "",
        *check_table(verdict),
        "",
        *table(
            ("Joint", "Action error, mrad", "95 % interval", "Standing still, mrad", "Against full precision, mrad"),
            (
                (
                    name,
                    mrad(action.per_joint[name]),
                    f"{mrad(action.joint_intervals[name].low)} to {mrad(action.joint_intervals[name].high)}",
                    mrad(evaluation.hold.per_joint[name]),
                    mrad(evaluation.compression.error.per_joint[name]) if evaluation.compression else "–",
                )
                for name in evaluation.joint_names
            ),
        ),
        "",
        f"Inference p50 {latency.p50:.1f}, p95 {latency.p95:.1f}, p99 {latency.p99:.1f} ms.",
    ]
    for title, groups in (("Phase", evaluation.phases), ("Instruction", evaluation.instructions)):
        rows = (
            (label, g.frames, mrad(g.action), f"{mrad(g.interval.low)} to {mrad(g.interval.high)}")
            for label, g in groups.items()
        )
        lines += ["", *table((title, "Frames", "Action error, mrad", "95 % interval"), rows)]
    if evaluation.skipped or evaluation.warnings:
        lines += ["", *(f"- {count} x {reason}" for reason, count in evaluation.skipped.items())]
        lines += [f"- {warning}" for warning in evaluation.warnings]
    return write_text(path, "\n".join(lines) + "\n")


def check_table(verdict: Verdict) -> list[str]:
    """One row for every limit."""
    rows = (
        (
            "pass" if c.passed else "**fail**",
            c.name,
            f"{c.value:.4g}",
            f"{c.relation} {c.limit:g} {c.unit}".strip(),
            c.sentence,
        )
        for c in verdict.checks
    )
    return table(("", "Figure", "Value", "Limit", "In words"), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; whatever is in a cell cannot end it."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]
