"""What the controller says about itself, for status and diagnostics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_edge.control.counters import Counters
from vla_edge.control.exchange import COUNTERS, text
from vla_edge.control.lateness import LatenessHistogram
from vla_edge.control.modes import Mode
from vla_edge.control.realtime import RealtimeGrant
from vla_edge.control.screening import REJECTIONS
from vla_edge.types import NANOSECONDS


@dataclass(frozen=True)
class ControlReport:
    """The controller as of its last report, at most 50 ms old while it lives.

    Attributes:
        mode, reason: present mode and why.
        speed: along the chunk, 0 to 1.
        chunk_stamp_ns: newest accepted chunk on the message clock, None before the first.
        counters: totals.
        lateness: of the loop's wake-ups. work: time each tick took.
        overruns: deadlines passed before their tick could run; made up for, never skipped silently.
        tick_hz: ticks per second since start.
        rejection: sentence of the last refused chunk, empty for none.
        taken_over_ns, handed_back_ns: begin and end of an operator's newest turn on the message clock, None where there
            was none or it goes on.
        grant: what the operating system allowed.
        sink_errors: commands the sink failed to take.
        listened: whether anyone takes the commands, as of when the robot was last at rest.
        age: s since the controller wrote this.
    """

    mode: Mode
    reason: str
    speed: float
    chunk_stamp_ns: int | None
    counters: Counters
    lateness: LatenessHistogram
    work: LatenessHistogram
    overruns: int
    tick_hz: float
    rejection: str
    taken_over_ns: int | None
    handed_back_ns: int | None
    grant: RealtimeGrant
    sink_errors: int
    listened: bool
    age: float


def read_report(
    fields: Mapping[str, np.ndarray], refused: Mapping[str, int], refused_joints: int, rejection: str
) -> ControlReport:
    """A report from the mailbox of that name, joined with what was refused before it reached the controller.

    Args:
        refused: reason -> chunks. refused_joints: joint states. rejection: sentence of the last refused chunk.
    """
    counters = Counters(**dict(zip(COUNTERS, fields["counters"].tolist())))
    counters.bad_joint_states += refused_joints
    counters.rejected = {
        reason: int(count) + refused.get(reason, 0) for reason, count in zip(REJECTIONS, fields["rejected"])
    }
    seconds = (int(fields["stamp"]) - int(fields["began"])) / NANOSECONDS

    def on_message_clock(name: str) -> int | None:
        return int(fields[name]) + int(fields["offset"]) if int(fields[name]) else None

    return ControlReport(
        mode=Mode(int(fields["mode"])),
        reason=text(fields["reason"]),
        speed=float(fields["speed"]),
        chunk_stamp_ns=on_message_clock("chunk_stamp"),
        taken_over_ns=on_message_clock("taken_over"),
        handed_back_ns=on_message_clock("handed_back"),
        counters=counters,
        lateness=LatenessHistogram(fields["lateness"], int(fields["late_maximum"])),
        work=LatenessHistogram(fields["work"], int(fields["work_maximum"])),
        overruns=int(fields["overruns"]),
        tick_hz=counters.ticks / seconds if seconds > 0.1 else float("nan"),
        rejection=text(fields["rejection"]) or rejection,
        grant=RealtimeGrant(*map(bool, fields["granted"]), text(fields["recipe"]), text(fields["note"])),
        sink_errors=int(fields["sink_errors"]),
        listened=bool(fields["listened"]),
        age=(time.monotonic_ns() - int(fields["stamp"])) / NANOSECONDS,
    )
