"""The report of a replay: an HTML file to look at, a JSON file to compute with and a Markdown file to quote from."""

from __future__ import annotations

import base64
import math
from pathlib import Path

import numpy as np

from vla_edge.evaluate.evaluation import Evaluation
from vla_edge.evaluate.markdown import write_markdown
from vla_edge.evaluate.page import (
    Page,
    data_uri,
    folded,
    legend,
    mrad,
    scaled,
    subheading,
    table,
    text,
    two,
    write_json,
)
from vla_edge.evaluate.report_engine import add_disagreement, add_engine, add_latency
from vla_edge.evaluate.serving import PAUSE_S
from vla_edge.evaluate.verdict import Verdict, judge

FOOTER = (
    "Angles in rad and mrad, times in ms. Errors are means of absolute values over frames, points of the horizon and "
    "joints; intervals are 95 % bootstrap intervals over stretches of two horizons. This file needs no network."
)


def write_report(evaluation: Evaluation, path: str | Path, verdict: Verdict | None = None) -> tuple[Path, Path, Path]:
    """Writes `path` (HTML) and the same name ending in .json and .md; returns the three paths.

    Args:
        verdict: by other limits than the default ones.
    """
    verdict = verdict or judge(evaluation)
    page = Page(
        f"{evaluation.engine.get('name', 'Engine')} on {evaluation.bag}",
        f"{evaluation.frames} frames of {evaluation.duration_s:.1f} s evaluated"
        + (f" at {evaluation.rate_hz:g} Hz" if evaluation.rate_hz else ""),
    )
    page.verdict(verdict)
    add_replay(page, evaluation)
    html = page.write(path, FOOTER)
    json = write_json(Path(path).with_suffix(".json"), to_json(evaluation, verdict))
    return html, json, write_markdown(evaluation, verdict, Path(path).with_suffix(".md"))


def to_json(evaluation: Evaluation, verdict: Verdict) -> dict:
    """What stands beside the page."""
    return {"passed": verdict.passed, "checks": verdict.checks, **evaluation.to_dict()}


def add_replay(page: Page, evaluation: Evaluation) -> None:
    """Adds the figures, plots and pictures of a replay to a page."""
    page.cards(_cards(evaluation))
    _add_filters(page, evaluation)
    if evaluation.traces:
        _add_trajectories(page, evaluation)
    _add_errors(page, evaluation)
    if evaluation.compression is not None or evaluation.control is not None:
        add_engine(page, evaluation)
    if evaluation.disagreement is not None:
        add_disagreement(page, evaluation)
    add_latency(page, evaluation)
    if evaluation.snapshots:
        page.section(
            "Frames with the largest error",
            "What the policy was looking at where its chunk and the robot's motion differ most.",
            f'<div class="frames">{"".join(_figure(evaluation, s) for s in evaluation.snapshots)}</div>',
        )
    _add_details(page, evaluation)


def _cards(evaluation: Evaluation):
    action, interval = evaluation.action, evaluation.action.interval
    yield (
        "Action error",
        mrad(action.mean),
        "mrad",
        f"{mrad(interval.low)} to {mrad(interval.high)}; standing still {mrad(evaluation.hold.mean)}",
    )
    if evaluation.compression is not None:
        compression = evaluation.compression
        yield (
            "Against full precision",
            f"{100 * compression.relative:.2f}",
            "%",
            f"of the motion ({mrad(compression.error.mean)} mrad), cosine {compression.cosine_mean:.4f}",
        )
    if evaluation.command is not None:
        yield "Against the commands", mrad(evaluation.command.mean), "mrad", "what the joints were told meanwhile"
    latency = evaluation.latency_ms
    yield "Inference", f"{latency.p50:.1f}", "ms", f"p95 {latency.p95:.1f}, p99 {latency.p99:.1f}"
    jump = evaluation.jump_rad
    if jump.n:
        yield "Step between chunks", mrad(jump.p50), "mrad", f"largest joint; p95 {mrad(jump.p95)}"


def _add_filters(page: Page, evaluation: Evaluation) -> None:
    """One bar that narrows trajectories, time lines and pictures to an instruction or a phase."""
    instructions, phases = list(evaluation.instructions), list(evaluation.phases)
    results = evaluation.results
    page.data(
        "frames",
        {
            "instruction": [instructions.index(result.instruction) for result in results],
            "phase": [phases.index(result.phase) for result in results],
            "known": [result.known for result in results],
            "error_mrad": [scaled(result.error_rad, 1e3) for result in results],
            "apart_mrad": [scaled(result.compression_rad, 1e3) for result in results],
        },
    )

    def choice(name: str, label: str, values: list[str]) -> str:
        options = "".join(f'<option value="{i}">{text(value)}</option>' for i, value in enumerate(values))
        return f'<label>{label} <select id="only-{name}"><option value="">all</option>{options}</select></label>'

    page.section(
        "Show",
        "Narrows the trajectories, the lines over time and the pictures below.",
        f'<div class="controls" id="filters">{choice("instruction", "Instruction", instructions)}'
        f'{choice("phase", "Phase", phases)}<span id="selection" class="soft" role="status"></span></div>',
    )


def _add_trajectories(page: Page, evaluation: Evaluation) -> None:
    traces, joints = evaluation.traces, evaluation.joint_names
    times, rows = _merged_truth(evaluation)
    moved = np.nanmax(rows, axis=0) - np.nanmin(rows, axis=0) if len(rows) else np.zeros(len(joints))
    has_reference = traces[0].reference is not None
    page.data(
        "traces",
        {
            "joints": joints,
            "steps": evaluation.chunk_size,
            "dt": evaluation.dt,
            "start_s": [round(trace.time_s, 4) for trace in traces],
            "frame": [trace.frame for trace in traces],
            "chunk": _pack(np.stack([trace.chunk for trace in traces])),
            "reference": _pack(np.stack([trace.reference for trace in traces])) if has_reference else None,
            "truth_s": [round(float(time), 4) for time in times],
            "truth": _pack(rows),
            "first_joint": int(np.argmax(moved)),
        },
    )
    entries = {"what the robot did": "truth", "the engine's chunks": "engine"}
    switch = ""
    if has_reference:
        entries["full precision"] = "reference"
        switch = '<label><input type="checkbox" id="withreference" checked>show full precision</label>'
    options = "".join(f"<option>{text(name)}</option>" for name in joints)
    page.section(
        "Trajectories",
        "Each thin line is one chunk, drawn from its observation to its horizon. Arrow keys on the plot move through "
        "time and joints.",
        f'<div class="controls"><label>Joint <select id="joint">{options}</select></label>'
        '<label>Window <select id="width"><option value="4">4 s</option><option value="8" selected>8 s</option>'
        '<option value="20">20 s</option><option value="1e9">all</option></select></label>'
        f'<label>From <input type="range" id="at" aria-label="start of the window"></label>{switch}</div>',
        legend(entries, dashed=("full precision",)),
        '<div class="chart" id="trajectories" tabindex="0" aria-label="Trajectories; arrow keys move"></div>',
    )


def _add_errors(page: Page, evaluation: Evaluation) -> None:
    milli = 1e3
    joints = evaluation.joint_names
    bars = page.chart(
        "joints",
        "bars",
        "Action error by joint",
        names=[name.removesuffix("_joint").replace("_", " ") for name in joints],
        values=[scaled(evaluation.action.per_joint[name], milli) for name in joints],
        marks=[scaled(evaluation.hold.per_joint[name], milli) for name in joints],
        unit="mrad",
    )
    series = [("engine", "engine", evaluation.action.per_step, False)]
    if evaluation.reference_action is not None:
        series.append(("full precision", "reference", evaluation.reference_action.per_step, True))
    series.append(("standing still", "hold", evaluation.hold.per_step, False))
    horizon = page.chart(
        "horizon",
        "lines",
        "Action error over the horizon",
        x=[(step + 1) * evaluation.dt for step in range(evaluation.chunk_size)],
        series=[
            {"name": name, "color": color, "dashed": dashed, "y": [scaled(value, milli) for value in values]}
            for name, color, values, dashed in series
        ],
        unitX="s",
        unitY="mrad",
    )
    over_time = page.chart(
        "overtime",
        "lines",
        "Action error over the recording",
        height=200,
        frames=True,
        pause=PAUSE_S,
        x=[round(result.time_s, 4) for result in evaluation.results],
        series=[
            {"name": "error", "color": "engine", "y": [scaled(r.error_rad, milli) for r in evaluation.results]}
        ],
        unitX="s",
        unitY="mrad",
    )
    colors = {name: color for name, color, _, _ in series}
    rows = (
        (
            name,
            mrad(evaluation.action.per_joint[name]),
            _span(evaluation.action.joint_intervals[name]),
            mrad(evaluation.hold.per_joint[name]),
        )
        + ((mrad(evaluation.compression.error.per_joint[name]),) if evaluation.compression else ())
        for name in joints
    )
    columns = ("Joint", "Action error, mrad", "95 % interval", "Standing still, mrad")
    columns += ("Against full precision, mrad",) if evaluation.compression else ()
    page.section(
        "Error",
        "Mean absolute difference between the chunk and what the robot measurably did at the same moments. The grey "
        "marks are the error of a policy that never moves: a joint whose bar reaches its mark learned nothing.",
        two(
            subheading("By joint") + legend({"engine": "engine", "standing still": "hold"}) + bars,
            subheading("Over the horizon")
            + legend(colors, dashed=("full precision",))
            + horizon
            + subheading("Over the recording")
            + over_time,
        ),
        folded("The same as a table", table(columns, rows, numeric=(1, 2, 3, 4))),
    )


def _figure(evaluation: Evaluation, snapshot) -> str:
    result = evaluation.results[snapshot.frame]
    images = "".join(
        f'<img alt="camera {text(name)} at {result.time_s:.2f} s" src="{data_uri(picture, "image/jpeg")}">'
        for name, picture in snapshot.pictures.items()
    )
    return (
        f'<figure data-frame="{snapshot.frame}">{images}<figcaption>'
        f"<b>{mrad(result.error_rad)} mrad</b> at {result.time_s:.2f} s<br>"
        f'<span class="soft">{text(result.instruction)}</span><br>'
        f'<button type="button" data-goto="{result.time_s:.2f}">Show its trajectory</button></figcaption></figure>'
    )


def _add_details(page: Page, evaluation: Evaluation) -> None:
    parts = []
    for title, groups in (("Phase", evaluation.phases), ("Instruction", evaluation.instructions)):
        rows = [
            (label, group.frames, mrad(group.action), _span(group.interval), mrad(group.compression))
            for label, group in groups.items()
        ]
        columns = (title, "Frames", "Action error, mrad", "95 % interval", "From full precision, mrad")
        parts.append(table(columns, rows, numeric=(1, 2, 3, 4)))
    left_out = [(reason, count) for reason, count in evaluation.skipped.items()]
    if left_out:
        parts.append(subheading("Left out") + table(("Reason", "Count"), left_out, numeric=(1,)))
    if evaluation.warnings:
        lines = "".join(f'<p class="note">{text(line)}</p>' for line in evaluation.warnings)
        parts.append(subheading("Repaired") + lines)
    told = [(f"engine {key}", value) for key, value in evaluation.engine.items()]
    told += [(f"reference {key}", value) for key, value in (evaluation.reference or {}).items()]
    told += [("noise seed", evaluation.seed), ("chunk", f"{evaluation.chunk_size} points of {evaluation.dt:g} s")]
    parts.append(folded("What was evaluated", table(("", ""), told)))
    page.section(
        "Phases, instructions, details",
        "The first second of an instruction, moving and resting; every wording; and what was not evaluated.",
        *parts,
    )


def _merged_truth(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """The measured motion behind all traces: (N,) s and (N, J) rad, each moment once."""
    steps = (np.arange(evaluation.chunk_size) + 1) * evaluation.dt
    times, rows = [], []
    for index, trace in enumerate(evaluation.traces):
        following = evaluation.traces[index + 1].time_s if index + 1 < len(evaluation.traces) else math.inf
        keep = trace.time_s + steps <= following + steps[0] - 1e-9
        times.append((trace.time_s + steps)[keep])
        rows.append(trace.truth[keep])
    return np.concatenate(times), np.concatenate(rows)


def _pack(values: np.ndarray) -> str:
    """Angles as base64 of little-endian int16 in 0.1 mrad: a quarter of the digits, and finer than a screen shows."""
    known = np.isfinite(values)
    ints = np.where(known, np.clip(np.rint(np.where(known, values, 0) * 1e4), -32767, 32767), -32768)
    return base64.b64encode(ints.astype("<i2").tobytes()).decode()


def _span(interval) -> str:
    return f"{mrad(interval.low)} to {mrad(interval.high)}"
