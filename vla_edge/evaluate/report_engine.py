"""The sections of a replay's report about the engine itself: its stages, its controller, its certainty, its time."""

from __future__ import annotations

import math

import numpy as np

from vla_edge.evaluate.evaluation import Evaluation
from vla_edge.evaluate.page import Page, scaled, subheading, table, two
from vla_edge.evaluate.serving import PAUSE_S


def add_engine(page: Page, evaluation: Evaluation) -> None:
    """What compression did stage by stage, and what the controller makes of it."""
    parts = []
    if evaluation.stage_errors:
        bars = page.chart(
            "stages", "bars", "Error of each stage",
            names=list(evaluation.stage_errors),
            values=[scaled(error, 100) for error in evaluation.stage_errors.values()],
            unit="% of its output, given full precision's input",
        )  # fmt: skip
        parts.append(subheading("By stage") + bars)
    if evaluation.control is not None:
        rows = []
        for label, control in (("engine", evaluation.control), ("full precision", evaluation.reference_control)):
            if control is not None:
                why = ", ".join(f"{count} for {reason}" for reason, count in control.rejected.items()) or "none"
                jerk = f"{control.jerk_rms:.1f}"
                rows.append((label, control.accepted, why, control.limit_hits, control.holds, jerk))
        head = ("", "Chunks followed", "Refused", "Ticks limited", "Ran out", "Jerk, rad/s\u00b3")
        delay = f"Chunks {1e3 * evaluation.control.delay_s:.0f} ms late"
        parts.append(subheading(f"In the controller: {delay}") + table(head, rows, numeric=(1, 3, 4, 5)))
    if evaluation.effectors:
        rows = (
            (link, f"{e.action:.1f}", f"{e.interval.low:.1f} to {e.interval.high:.1f}", _known(e.compression))
            for link, e in evaluation.effectors.items()
        )
        head = ("End effector", "From where it was, mm", "95 % interval", "From full precision, mm")
        parts.append(subheading("End effectors") + table(head, rows, numeric=(1, 2, 3)))
    page.section("Engine and controller", "Where the error arises, and what the joints would have been told.", *parts)


def add_disagreement(page: Page, evaluation: Evaluation) -> None:
    """How far chunks from other noise lie apart, and what that tells."""
    found = evaluation.disagreement
    dots = page.chart(
        "disagreement", "dots", "Error against disagreement",
        x=[scaled(result.disagreement_rad, 1e3) for result in evaluation.results],
        y=[scaled(result.error_rad, 1e3) for result in evaluation.results],
        unitX="mrad between chunks from other noise", unitY="mrad from what the robot did",
    )  # fmt: skip
    page.section(
        "Does it know when it does not know?",
        f"{found.samples} chunks from other noise on every frame lie {100 * found.relative:.1f} % of the motion apart. "
        f"Rank correlation with the error is {found.rank_correlation:.2f}; the tenth of the frames with the largest "
        f"disagreement has {found.top_tenth_error_ratio:.1f} times the error of the others.",
        dots,
    )


def add_latency(page: Page, evaluation: Evaluation) -> None:
    """How long inferences took here, and what follows from that."""
    values = np.array([result.latency_ms for result in evaluation.results])
    top = max(float(np.percentile(values, 99.5)), evaluation.latency_ms.p99) * 1.02
    low = float(values.min()) * 0.98
    counts, edges = np.histogram(values.clip(max=top), bins=min(48, max(8, len(values) // 3)), range=(low, top))
    latency = evaluation.latency_ms
    histogram = page.chart(
        "latency",
        "histogram",
        "Latency of an inference",
        counts=counts,
        edges=edges,
        marks={"p50": latency.p50, "p99": latency.p99},
        unitX="ms",
        unitY="frames",
    )
    rows = [(name, f"{p.p50:.2f}", f"{p.p95:.2f}", f"{p.p99:.2f}") for name, p in evaluation.stage_ms.items()]
    rows.append(("total", f"{latency.p50:.2f}", f"{latency.p95:.2f}", f"{latency.p99:.2f}"))
    page.section(
        "Latency",
        "Wall time of an inference on the machine that wrote this report, from the aligned observation to the chunk.",
        two(histogram, table(("Part", "p50, ms", "p95, ms", "p99, ms"), rows, numeric=(1, 2, 3))),
        subheading("Over the recording"),
        page.chart(
            "latencies", "lines", "Latency over the recording", height=170, frames=True, pause=PAUSE_S,
            x=[round(result.time_s, 4) for result in evaluation.results],
            series=[{"name": "inference", "color": "engine", "y": [round(v, 3) for v in values.tolist()]}],
            unitX="s", unitY="ms",
        ),
        _serving(evaluation),
        _decoding(evaluation),
    )  # fmt: skip


def _serving(evaluation: Evaluation) -> str:
    serving, rate = evaluation.serving, evaluation.rate_hz
    if not serving.staleness_ms.n:
        return ""
    asked = f" of the {rate:g} asked for" if rate else ""
    return (
        f'<p class="note">At these latencies it serves {serving.served} of {serving.offered} observations, '
        f"{serving.rate_hz:.2f} a second{asked}, and the robot acts on pictures up to "
        f"{serving.staleness_ms.p50:.0f} ms old (p99 {serving.staleness_ms.p99:.0f}).</p>"
    )


def _decoding(evaluation: Evaluation) -> str:
    if (decoding := evaluation.decoding) is None:
        return ""
    return (
        f'<p class="note">A chunk\'s tokens took {decoding.passes:.2f} passes of the language model on average, '
        f"{decoding.tokens_per_pass:.2f} tokens in a pass.</p>"
    )


def _known(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "–"
