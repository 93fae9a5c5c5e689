"""What the controller counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from vla_edge.control.screening import REJECTIONS


@dataclass
class Counters:
    """Totals since construction.

    Attributes:
        ticks: calls of tick. steps: grid periods advanced; others than ticks when some came early or late.
        limit_hits: steps in which a limit changed the command.
        holds, faults: entries into these modes, re-arming apart.
        late: ticks `late_ticks` or more late. gaps: pauses of `pause_ticks` or more.
        reflexes: times the robot gave way to a contact.
        near_collisions: times it stopped before parts of the robot touched.
        interventions: times an operator took over. operator_refused: commands of an operator refused.
        accepted: chunks taken. rejected: reason -> chunks refused. bad_joint_states: messages refused.
    """

    ticks: int = 0
    steps: int = 0
    limit_hits: int = 0
    holds: int = 0
    faults: int = 0
    late: int = 0
    gaps: int = 0
    accepted: int = 0
    bad_joint_states: int = 0
    reflexes: int = 0
    near_collisions: int = 0
    interventions: int = 0
    operator_refused: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECTIONS, 0))
