"""The report of a live run: what the robot did when asked, how fast the loop was, and its replay underneath."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from vla_edge.evaluate.evaluation import Evaluation
from vla_edge.evaluate.metrics import wilson_interval
from vla_edge.evaluate.page import Page, data_uri, subheading, table, text, two, write_json
from vla_edge.evaluate.report import FOOTER, add_replay
from vla_edge.evaluate.verdict import Check, Verdict, check

# A larger film stays beside the page instead of inside it.
MAX_FILM_BYTES = 12_000_000
_FILM_TYPES = {
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".png": "image/png",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}


def write_demo_report(
    report: Mapping,
    path: str | Path,
    evaluation: Evaluation | None = None,
    film: str | Path | None = None,
    min_success: float = 0.8,
    min_chunk_rate_hz: float = 5.0,
    problems: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Writes `path` (HTML) and the same name ending in .json (the report itself, with the verdict); returns both.

    Args:
        report: `episodes`, `successes`, `chunk_rate_hz`, `observation_to_chunk_ms` (p50, p95, p99), `engine` (name,
            precision, backend, bytes, stage_ms), `controller` (tick_hz, lateness_us, ticks, limit_hits, holds),
            `replay`; and `episode_results`, rows with seed, instruction, success, seconds and whatever else there is.
        evaluation: the replay of the recording, for its plots.
        film: moving picture of the run, put into the page.
        problems: steps that failed; each fails the run.
    """
    verdict = judge_demo(report, min_success, min_chunk_rate_hz, problems)
    page = Page(
        "A language-conditioned policy drives a simulated G1",
        f"{report['episodes']} episodes through the live nodes: camera to chunk to joint command",
    )
    page.verdict(verdict)
    page.cards(_cards(report))
    if film is not None:
        page.section("The run", "The robot carrying out the instructions.", _film(Path(film)))
    if report.get("episode_results"):
        page.section("Episodes", "Success is judged by the physics state, never by the policy.", _episodes(report))
    page.section("The loop", "Measured while it ran, on the machine that wrote this report.", _loop(report))
    if evaluation is not None:
        add_replay(page, evaluation)
    html = page.write(path, FOOTER)
    return html, write_json(
        Path(path).with_suffix(".json"), {**report, "passed": verdict.passed, "checks": verdict.checks}
    )


def judge_demo(
    report: Mapping, min_success: float = 0.8, min_chunk_rate_hz: float = 5.0, problems: Sequence[str] = ()
) -> Verdict:
    """Applies the limits of a live run."""
    episodes, successes = report["episodes"], report["successes"]
    rate = successes / episodes if episodes else math.nan
    interval = wilson_interval(successes, episodes)
    chunk_rate = report.get("chunk_rate_hz")
    chunk_rate = math.nan if chunk_rate is None else float(chunk_rate)
    checks = [
        check(
            "success_rate",
            rate,
            "",
            ">=",
            min_success,
            f"{successes} of {episodes} instructions were carried out (95 % interval {100 * interval.low:.0f} to "
            f"{100 * interval.high:.0f} %); at least {100 * min_success:.0f} % have to be.",
        ),
        check(
            "chunk_rate_hz",
            chunk_rate,
            "Hz",
            ">=",
            min_chunk_rate_hz,
            f"{chunk_rate:.2f} chunks a second reached the controller; at least {min_chunk_rate_hz:g} have to.",
        ),
    ]
    checks += [Check(f"step_{i + 1}", math.nan, "", ">=", 1.0, False, problem) for i, problem in enumerate(problems)]
    return Verdict(tuple(checks))


def _cards(report: Mapping):
    interval = wilson_interval(report["successes"], report["episodes"])
    share = report["successes"] / report["episodes"] if report["episodes"] else math.nan
    yield "Success", f"{100 * share:.0f}", "%", f"95 % interval {100 * interval.low:.0f} to {100 * interval.high:.0f} %"
    latency = report.get("observation_to_chunk_ms") or {}
    if latency:
        yield "Observation to chunk", _number(latency.get("p50")), "ms", _spread(latency, ("p95", "p99"))
    yield "Chunk rate", _number(report.get("chunk_rate_hz")), "Hz", "chunks that reached the controller"
    lateness = (report.get("controller") or {}).get("lateness_us") or {}
    if lateness:
        yield "Controller lateness", _number(lateness.get("p99")), "µs", f"p99; {_spread(lateness, ('p50', 'max'))}"
    engine = report.get("engine") or {}
    if engine.get("bytes"):
        kind = ", ".join(str(engine[key]) for key in ("precision", "backend") if engine.get(key))
        yield "Engine", f"{engine['bytes'] / 1e6:.1f}", "MB", kind


def _episodes(report: Mapping) -> str:
    rows = report["episode_results"]
    known = ("seed", "instruction", "success", "wrong_first", "seconds")
    columns = [key for key in known if any(key in row for row in rows)]
    columns += [key for key in rows[0] if key not in known and isinstance(rows[0][key], (int, float, str, bool))]
    return table(
        [column.replace("_", " ").capitalize() for column in columns],
        ([_cell(row.get(column)) for column in columns] for row in rows),
        numeric=[i for i, column in enumerate(columns) if column in ("seed", "seconds")],
    )


def _loop(report: Mapping) -> str:
    controller, engine = report.get("controller") or {}, report.get("engine") or {}
    plain = {key: value for key, value in controller.items() if not isinstance(value, Mapping)}
    left = [(key.replace("_", " "), _cell(value)) for key, value in plain.items()]
    left += [
        (f"{key.replace('_', ' ')} {name}", _cell(value))
        for key, values in controller.items()
        if isinstance(values, Mapping)
        for name, value in values.items()
    ]
    right = [(key, _cell(value)) for key, value in engine.items() if not isinstance(value, Mapping)]
    right += [(f"{name}, ms", _cell(_p50(value))) for name, value in (engine.get("stage_ms") or {}).items()]
    return two(
        subheading("Controller") + table(("", ""), left, numeric=(1,)),
        subheading("Engine") + table(("", ""), right, numeric=(1,)),
    )


def _film(path: Path) -> str:
    mime = _FILM_TYPES.get(path.suffix.lower())
    if mime is None or not path.is_file():
        return f'<p class="note">No film was recorded at {text(path.name)}.</p>'
    if path.stat().st_size > MAX_FILM_BYTES:
        return f'<p class="note">The film is beside this file: {text(path.name)}</p>'
    uri = data_uri(path.read_bytes(), mime)
    if mime.startswith("video"):
        return f'<video class="film" controls muted loop src="{uri}"></video>'
    return f'<img class="film" alt="the robot carrying out the instructions" src="{uri}">'


def _p50(value: object) -> object:
    return value.get("p50") if isinstance(value, Mapping) else value


def _spread(values: Mapping, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_number(values[name])}" for name in names if name in values)


def _number(value: object) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    return "–" if value is None else str(value)
