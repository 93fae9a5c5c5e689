"""The page of a comparison: verdict-sized table first, then where each engine stands between error, size and time."""

from __future__ import annotations

from pathlib import Path

from vla_edge.evaluate.comparison import Comparison, Contender
from vla_edge.evaluate.metrics import wilson_interval
from vla_edge.evaluate.page import Page, folded, subheading, table, two, write_json

FOOTER = (
    "Action error: mean absolute difference of the chunks to full precision from the same noise, on observations the "
    "engines were not calibrated on, over the standard deviation of the motion. Successes: the same seeds for all, in "
    "simulation; the bound is one-sided, 95 %. Times: of the build, on the machine that built. No network needed."
)


def write_comparison_report(comparison: Comparison, path: str | Path) -> tuple[Path, Path]:
    """Writes the page and the same as JSON beside it."""
    rows = comparison.contenders
    n = len(comparison.reference)
    told = f"{len(rows)} engines" + (f", {n} episodes of the tier {comparison.tier} each" if n else "")
    page = Page(f"{comparison.checkpoint}: recipes compared", told)
    smallest, nearest = min(rows, key=lambda c: c.bits), min(rows, key=_error)
    fastest = min(rows, key=_latency)
    cards = [
        ("Nearest to full precision", f"{100 * _error(nearest):.2f}", "%", f"of the motion: {nearest.name}"),
        ("Fewest bits", f"{smallest.bits:.2f}", "bits", f"per weight: {smallest.name}"),
        ("Fastest here", f"{_latency(fastest):.1f}", "ms", f"a chunk: {fastest.name}"),
    ]
    if n:
        successes = sum(comparison.reference.values())
        interval = wilson_interval(successes, n)
        cards.append(
            ("Full precision", f"{100 * successes / n:.1f}", "%",
             f"success, {100 * interval.low:.1f} to {100 * interval.high:.1f}")
        )  # fmt: skip
    page.cards(cards)
    columns = ["Recipe", "Bits", "Language MB", "Engine MB", "Action error %", "Frames 5 to 95 %", "Cosine", "Chunk ms"]
    if n:
        columns += ["Success %", "Lost, points", "At most", "Pairs that differ"]
    page.section(
        "Side by side",
        "Bits count scales and factors. What is lost in successes is against full precision, seed by seed; below zero "
        "is a gain.",
        table(columns, [_row(c, n) for c in rows], numeric=range(1, len(columns))),
    )
    names, errors = [c.name for c in rows], [round(100 * _error(c), 4) for c in rows]
    sizes, times = [round(c.engine_bytes / 1e6, 3) for c in rows], [round(_latency(c), 3) for c in rows]
    size = page.chart(
        "size", "scatter", "Error against size", names=names, x=sizes, y=errors, unitX="MB", unitY="% of the motion"
    )
    time = page.chart(
        "time", "scatter", "Error against latency", names=names, x=times, y=errors, unitX="ms a chunk",
        unitY="% of the motion",
    )  # fmt: skip
    page.section(
        "What is worth its price",
        "On the line: no other engine is both nearer to full precision and smaller, or faster.",
        two(subheading("Size") + size, subheading("Time") + time),
    )
    joints = list(rows[0].verification["per_joint"])
    by_joint = [(joint, *(f"{1e3 * c.verification['per_joint'][joint]:.2f}" for c in rows)) for joint in joints]
    stages = list(rows[0].profile_ms)
    by_stage = [(stage, *(f"{c.profile_ms[stage]['p50']:.2f}" for c in rows)) for stage in stages]
    page.section(
        "Where it comes from",
        "Mean absolute difference to full precision of each joint, mrad; and the median time of each stage, ms.",
        subheading("By joint") + table(("Joint", *names), by_joint, numeric=range(1, len(names) + 1)),
        subheading("By stage") + table(("Stage", *names), by_stage, numeric=range(1, len(names) + 1)),
        folded("What the recipes say of themselves", table(("Recipe", ""), [(c.name, c.description) for c in rows])),
    )
    html = page.write(path, FOOTER)
    return html, write_json(Path(path).with_suffix(".json"), to_json(comparison))


def to_json(comparison: Comparison) -> dict:
    """Everything in plain types."""
    n = len(comparison.reference)
    return {
        "checkpoint": comparison.checkpoint,
        "world": comparison.world,
        "tier": comparison.tier,
        "episodes": n,
        "seeds": [min(comparison.reference), max(comparison.reference)] if n else [],
        "full_precision_successes": sum(comparison.reference.values()),
        "engines": [
            {
                "name": c.name,
                "bundle": c.bundle.name,
                "bits": c.bits,
                "language_bytes": c.language_bytes,
                "engine_bytes": c.engine_bytes,
                "action_error_rel": _error(c),
                "verification": dict(c.verification),
                "profile_ms": dict(c.profile_ms),
                "successes": sum(c.successes.values()),
                "lost_points": c.drop_points,
                "lost_points_at_most": None if c.paired is None else 100 * c.paired.drop_bound(),
                "only_full_precision": None if c.paired is None else c.paired.only_first,
                "only_engine": None if c.paired is None else c.paired.only_second,
                "p_value": None if c.paired is None else c.paired.p_value,
            }
            for c in comparison.contenders
        ],
    }


def summary(comparison: Comparison) -> str:
    """The table for a terminal."""
    n = len(comparison.reference)
    lines = [
        f"{'recipe':18}{'bits':>7}{'MB':>8}{'error %':>9}{'ms':>8}"
        + (f"{'success':>9}{'lost':>8}{'<=':>8}" if n else "")
    ]
    for c in comparison.contenders:
        line = f"{c.name:18}{c.bits:7.2f}{c.engine_bytes / 1e6:8.2f}{100 * _error(c):9.2f}{_latency(c):8.1f}"
        if n:
            line += f"{100 * sum(c.successes.values()) / n:8.1f}%{c.drop_points:8.2f}{100 * c.paired.drop_bound():8.2f}"
        lines.append(line)
    if n:
        lines.append(f"{'full precision':50}{100 * sum(comparison.reference.values()) / n:8.1f}%   of {n} episodes")
    return "\n".join(lines)


def _row(c: Contender, n: int) -> tuple:
    low, high = c.verification["frame_error_rel"]
    row = (
        c.name, f"{c.bits:.2f}", f"{c.language_bytes / 1e6:.2f}", f"{c.engine_bytes / 1e6:.2f}",
        f"{100 * _error(c):.2f}",
        f"{100 * low:.2f} to {100 * high:.2f}", f"{c.verification['cosine']:.5f}", f"{_latency(c):.1f}",
    )  # fmt: skip
    if not n:
        return row
    differ = c.paired.only_first + c.paired.only_second
    success = f"{100 * sum(c.successes.values()) / n:.1f}"
    return (*row, success, f"{c.drop_points:.2f}", f"{100 * c.paired.drop_bound():.2f}", differ)


def _error(c: Contender) -> float:
    return c.verification["action_error_rel"]


def _latency(c: Contender) -> float:
    return c.profile_ms["total"]["p50"]
