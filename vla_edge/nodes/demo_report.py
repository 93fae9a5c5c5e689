"""What the demonstration leaves behind: film, evaluation of its recording, report, and one line for the console."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vla_edge.nodes.build_node import Progress
from vla_edge.nodes.demo_monitor import Monitor
from vla_edge.types import VlaEdgeError


def engine_facts(monitor: Monitor) -> dict:
    """Name, precision, backend, bytes and stage_ms, as the vla node says."""
    said = monitor.diagnostics.get("vla", {})
    facts: dict = {key.removeprefix("engine."): value for key, value in said.items() if key.startswith("engine.")}
    if facts.get("bytes"):
        facts["bytes"] = int(facts["bytes"])
    stages = [key.split(".")[1].removesuffix("_ms") for key in said if key.startswith("stage.") and key.endswith(".p50")]
    facts["stage_ms"] = {
        stage: {p: monitor.value("vla", f"stage.{stage}_ms.{p}") for p in ("p50", "p95", "p99")} for stage in stages
    }
    return facts


def controller_facts(monitor: Monitor) -> dict:
    """Rate, lateness and what it had to do, as the controller says."""
    value = monitor.value
    whole = ("ticks", "limit_hits", "holds", "faults", "overruns")
    return {
        "tick_hz": value("controller", "tick_hz"),
        "lateness_us": {p: value("controller", f"lateness_us.{p}") for p in ("p50", "p99", "p999", "max")},
        **{key: None if (count := value("controller", key)) is None else int(count) for key in whole},
        "chunks_accepted": value("controller", "chunks.accepted"),
        "rejected": {
            key.removeprefix("rejected."): int(text)
            for key, text in monitor.diagnostics.get("controller", {}).items()
            if key.startswith("rejected.") and text not in ("", "0")
        },
        "realtime": monitor.diagnostics.get("controller", {}).get("realtime"),
    }


def write_report(node, values, monitor: Monitor, rows: Sequence[dict], problems: Sequence[str]) -> int:
    """Writes everything; 0 when the demonstration passed."""
    from vla_edge.evaluate.demo_report import judge_demo, write_demo_report

    output, problems, log = Path(values.output), list(problems), node.get_logger()
    evaluation = film = None
    if values.bag:
        film = attempt(problems, "film", make_film, values.bag, output / "demo.gif", rows)
        evaluation = attempt(problems, "evaluation", evaluate, values)
        attempt(problems, "bag", link_bag, Path(values.bag), output / "demo.mcap")
    report = {
        "episodes": len(values.seeds),
        "successes": sum(row["success"] for row in rows),
        "chunk_rate_hz": monitor.chunk_rate_hz(),
        "observation_to_chunk_ms": monitor.observation_to_chunk_ms(),
        "engine": engine_facts(monitor),
        "controller": controller_facts(monitor),
        "ros_overhead_ms": {p: monitor.value("vla", f"overhead_ms.{p}") for p in ("p50", "p95", "p99")},
        "replay": None if evaluation is None else {
            "frames": evaluation.frames,
            "action_mae_rad": evaluation.action.mean,
            "per_joint": dict(evaluation.action.per_joint),
            **({"action_error_rel": evaluation.compression.relative} if evaluation.compression else {}),
        },
        "episode_results": [{k: v for k, v in row.items() if not k.endswith("_ns")} for row in rows],
        "problems": problems,
    }
    html, json = write_demo_report(
        report, output / "report.html", evaluation, film, values.min_success, values.min_chunk_rate, problems
    )
    verdict = judge_demo(report, values.min_success, values.min_chunk_rate, problems)
    for check in verdict.checks:
        # One call each: rclpy remembers the severity of every place that logs.
        if check.passed:
            log.info(check.sentence)
        else:
            log.error(check.sentence)
    late, age = report["controller"]["lateness_us"]["p99"], report["observation_to_chunk_ms"].get("p50")
    print(
        f"\n{'PASSED' if verdict.passed else 'FAILED'}  {report['successes']}/{report['episodes']} instructions, "
        f"{report['chunk_rate_hz']:.2f} chunks/s, observation to chunk p50 {_text(age)} ms, "
        f"controller lateness p99 {_text(late)} us\n{html}\n{json}",
        flush=True,
    )
    return 0 if verdict.passed else 1


def evaluate(values):
    """The engine on the recording, beside full precision where a checkpoint is given."""
    from vla_edge.evaluate.replay import evaluate_bag

    show = Progress()
    return evaluate_bag(
        values.bag, values.bundle, reference=values.checkpoint or None,
        progress=lambda fraction, frames: show(fraction, "evaluating the recording"),
    )


def make_film(bag: str, path: Path, rows: Sequence[dict]) -> Path:
    """The episodes one after another."""
    from vla_edge.evaluate.film import Scene, write_film

    scenes = [Scene(row["begin_ns"], row["end_ns"], row["instruction"], bool(row["success"])) for row in rows]
    return write_film(bag, path, scenes)


def link_bag(bag: Path, path: Path) -> None:
    """The bag's one file under a name that is easy to find."""
    (file,) = bag.glob("*.mcap")
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, path)


def attempt(problems: list[str], step: str, work, *arguments):
    """The result of a step, or None with the problem noted: one failed step must not hide the others."""
    try:
        return work(*arguments)
    except VlaEdgeError as error:
        problems.append(f"{step}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a failed step and no reason to lose the report
        problems.append(f"{step}: {type(error).__name__}: {error}")
    return None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
