"""The page of a build towards a target: whether it was reached, by what, and everything that was tried on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vla_edge.engine.kernels import Kernel
from vla_edge.engine.target import Attempt, Outcome, Target
from vla_edge.evaluate.kernels_report import add_kernels
from vla_edge.evaluate.page import Page, subheading, table, two, write_json

FOOTER = (
    "Rates: chunks a second that 19 of 20 inferences keep on the computer that built. Action error: mean absolute "
    "difference of the chunks to full precision, on observations the engines were not calibrated on, over the standard "
    "deviation of the motion. Memory: of a process with the engine, all it imports included. No network needed."
)


def asked(target: Target) -> str:
    """The target in words."""
    parts = [] if target.rate_hz is None else [f"{target.rate_hz:g} Hz"]
    parts += [] if target.memory_bytes is None else [f"{target.memory_bytes / 1e6:.0f} MB"]
    return f"{' within '.join(parts)}, action error at most {100 * target.action_error_rel:g} % of the motion"


def judged(attempt: Attempt, outcome: Outcome) -> str:
    """What became of an attempt."""
    if attempt.failure:
        return f"not built: {attempt.failure}"
    if not attempt.action_error_rel <= outcome.target.action_error_rel:
        return "errs too much"
    missed = outcome.target.missed(attempt)
    if not missed:
        return "reaches the target"
    return f"misses {' and '.join(missed)}"


def summary(outcome: Outcome) -> str:
    """For a terminal."""
    lines = [f"{'engine':28}{'Hz':>8}{'p50 ms':>9}{'p95':>8}{'error %':>9}{'MB':>8}{'process':>9}"]
    for a in outcome.attempts:
        figures = (
            f"{'':51}" if a.failure else f"{a.rate_hz:8.2f}{a.p50_ms:9.1f}{a.p95_ms:8.1f}{100 * a.action_error_rel:9.2f}"
            f"{a.bundle_bytes / 1e6:8.1f}{a.memory_bytes / 1e6:9.0f}"
        )
        held = f", held back by {a.bottleneck}" if a.bottleneck else ""
        lines.append(f"{a.draft.name:28}{figures}  {judged(a, outcome)}{held}")
    if outcome.reached:
        lines.append(f"{outcome.best.draft.name} reaches {asked(outcome.target)}")
    elif outcome.best is None:
        lines.append(f"no engine could be built for {asked(outcome.target)}")
    else:
        lines.append(
            f"nothing tried reaches {asked(outcome.target)}; nearest is {outcome.best.draft.name}, held back by "
            f"{outcome.bottleneck}. Next: {outcome.lever}"
        )
    return "\n".join(lines)


def write_target_report(
    outcome: Outcome, path: str | Path, name: str, kernels: Mapping[str, Sequence[Kernel]] | None = None
) -> Path:
    """Writes the page and the same as JSON beside it. `kernels`: stage -> those of the best engine's plan."""
    built = [a for a in outcome.attempts if not a.failure]
    page = Page(f"{name}: towards {asked(outcome.target)}", f"{len(outcome.attempts)} engines tried")
    best = outcome.best
    cards = [("Target", "reached" if outcome.reached else "not reached", "", asked(outcome.target))]
    if best is not None:
        cards += [
            ("By" if outcome.reached else "Nearest", best.draft.name, "", f"held back by {best.bottleneck}"),
            ("Rate", f"{best.rate_hz:.1f}", "Hz", f"p50 {best.p50_ms:.1f} ms, p95 {best.p95_ms:.1f} ms"),
            ("Action error", f"{100 * best.action_error_rel:.2f}", "%", "of the motion"),
        ]
    if not outcome.reached:
        cards.append(("In the way", outcome.bottleneck, "", outcome.lever))
    page.cards(cards)
    columns = ("Engine", "Because of", "Hz", "p50 ms", "p95 ms", "Error %", "Engine MB", "Process MB", "Held back by", "Verdict")
    rows = [
        (a.draft.name, a.because, *([""] * 6 if a.failure else _figures(a)), a.bottleneck, judged(a, outcome))
        for a in outcome.attempts
    ]
    page.section(
        "What was tried", "Each engine follows from what held the best one before it back.",
        table(columns, rows, numeric=range(2, 8)),
    )  # fmt: skip
    if built:
        names, errors = [a.draft.name for a in built], [round(100 * a.action_error_rel, 4) for a in built]
        time = page.chart(
            "time", "scatter", "Error against latency", names=names, x=[round(a.p95_ms, 3) for a in built], y=errors,
            unitX="ms a chunk, p95", unitY="% of the motion",
        )  # fmt: skip
        size = page.chart(
            "size", "scatter", "Error against memory", names=names, x=[round(a.memory_bytes / 1e6, 3) for a in built],
            y=errors, unitX="MB of the process", unitY="% of the motion",
        )  # fmt: skip
        page.section(
            "What is worth its price", "On the line: nothing tried is both nearer to full precision and faster, or smaller.",
            two(subheading("Time") + time, subheading("Memory") + size),
        )  # fmt: skip
    add_kernels(page, kernels or {})
    write_json(Path(path).with_suffix(".json"), to_json(outcome))
    return page.write(path, FOOTER)


def to_json(outcome: Outcome) -> dict:
    """Everything in plain types."""
    return {
        "target": vars(outcome.target),
        "reached": outcome.reached,
        "best": None if outcome.best is None else outcome.best.draft.name,
        "bottleneck": outcome.bottleneck,
        "lever": outcome.lever,
        "attempts": [
            {"name": a.draft.name, **a.to_dict(), "rate_hz": a.rate_hz, "judged": judged(a, outcome)}
            for a in outcome.attempts
        ],
    }


def _figures(a: Attempt) -> tuple[str, ...]:
    return (
        f"{a.rate_hz:.2f}", f"{a.p50_ms:.1f}", f"{a.p95_ms:.1f}", f"{100 * a.action_error_rel:.2f}",
        f"{a.bundle_bytes / 1e6:.1f}", f"{a.memory_bytes / 1e6:.0f}",
    )  # fmt: skip
