"""What a controller says of itself in its diagnostics."""

from __future__ import annotations

from vla_edge.control.modes import Mode
from vla_edge.control.process import NOBODY_LISTENS
from vla_edge.control.report import ControlReport
from vla_edge.nodes.control_inputs import ControlInputs
from vla_edge.nodes.health import Level

_LEVELS = {
    Mode.FOLLOW: Level.OK, Mode.OPERATOR: Level.OK, Mode.HOLD: Level.OK, Mode.INIT: Level.WARN,
    Mode.SLOWDOWN: Level.WARN,
}


def status_values(report: ControlReport, inputs: ControlInputs) -> dict[str, object]:
    """Key -> figure or words."""
    counters = report.counters
    return {
        "mode": report.mode.name, "reason": report.reason, "speed": report.speed, "tick_hz": report.tick_hz,
        "ticks": counters.ticks, "overruns": report.overruns, "limit_hits": counters.limit_hits,
        "holds": counters.holds, "faults": counters.faults, "late": counters.late, "gaps": counters.gaps,
        "reflexes": counters.reflexes, "near_collisions": counters.near_collisions,
        "interventions": counters.interventions, "chunks.accepted": counters.accepted,
        "rejected.joint_states": inputs.bad_joint_states + counters.bad_joint_states,
        "rejected.chunk_messages": inputs.bad_chunks,
        "rejected.operator": inputs.bad_operator + counters.operator_refused,
        **{f"rejected.chunk.{reason}": count for reason, count in counters.rejected.items()},
        **{f"lateness_us.{name}": value for name, value in report.lateness.summary().items()},
        **{f"work_us.{name}": value for name, value in report.work.summary().items()},
        "sink_errors": report.sink_errors, "listened": report.listened, "last_rejection": report.rejection,
        "last_problem": inputs.last_problem,
        "realtime": "; ".join(filter(None, (report.grant.recipe or "granted", report.grant.note))),
        "report_age_s": report.age,
    }


def status_level(report: ControlReport, alive: bool) -> tuple[Level, str]:
    """How bad it is, and the sentence that says so."""
    if not alive or report.age > 1.0:
        return Level.ERROR, "the controller's process is gone; restart this node"
    level, message = _LEVELS.get(report.mode, Level.ERROR), f"{report.mode.name}: {report.reason}"
    if not report.listened:
        message += f"; {NOBODY_LISTENS}"
    if level is Level.OK and report.grant.recipe:
        return Level.WARN, f"{message}; {report.grant.recipe}"
    return level, message
