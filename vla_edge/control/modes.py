"""What the controller is doing, and the one table of what may follow what."""

from __future__ import annotations

from enum import Enum, IntEnum


class Mode(IntEnum):
    """INIT: never armed, no command. HOLD: at rest, or braking to rest. FOLLOW: along a chunk. SLOWDOWN: along a
    chunk more slowly, or on its decelerating tail. DAMP: no stiffness, damping only. FAULT: frozen until re-armed.
    OPERATOR: a person moves the robot; chunks are refused."""

    INIT = 0
    HOLD = 1
    FOLLOW = 2
    SLOWDOWN = 3
    DAMP = 4
    FAULT = 5
    OPERATOR = 6


class Event(Enum):
    """What can change the mode."""

    REARM = "re-armed"
    CHUNK = "fresh chunk accepted"
    RUN_OUT = "chunk ran out"
    OVERLOAD = "ticks come late"
    RECOVER = "ticks come in time again"
    STARVE = "nothing fresh"
    TAKE_OVER = "an operator took over"
    HAND_BACK = "the operator handed back"
    HOLD = "hold requested"
    DAMP = "damping requested"
    FAULT = "fault"
    YIELD = "gave way to a contact"


FOLLOWING = (Mode.HOLD, Mode.FOLLOW, Mode.SLOWDOWN)
"""Modes in which chunks may be followed."""
MOVING = (*FOLLOWING, Mode.OPERATOR)
"""Modes in which the robot may be moved."""

TRANSITIONS: dict[tuple[Mode, Event], Mode] = {
    **{(mode, Event.REARM): Mode.HOLD for mode in Mode},
    **{(mode, Event.CHUNK): Mode.FOLLOW for mode in FOLLOWING},
    **{(mode, Event.TAKE_OVER): Mode.OPERATOR for mode in FOLLOWING},
    (Mode.OPERATOR, Event.HAND_BACK): Mode.HOLD,
    (Mode.FOLLOW, Event.RUN_OUT): Mode.SLOWDOWN,
    (Mode.FOLLOW, Event.OVERLOAD): Mode.SLOWDOWN,
    (Mode.SLOWDOWN, Event.RECOVER): Mode.FOLLOW,
    (Mode.FOLLOW, Event.STARVE): Mode.HOLD,
    (Mode.SLOWDOWN, Event.STARVE): Mode.HOLD,
    (Mode.OPERATOR, Event.STARVE): Mode.HOLD,
    **{(mode, Event.HOLD): Mode.HOLD for mode in MOVING},
    **{(mode, Event.YIELD): Mode.HOLD for mode in MOVING},
    **{(mode, Event.DAMP): Mode.DAMP for mode in (*MOVING, Mode.FAULT)},
    **{(mode, Event.FAULT): Mode.FAULT for mode in MOVING},
}
"""(mode, event) -> next mode. A pair that is not here leaves the mode as it is: DAMP and FAULT end only by REARM."""


def after(mode: Mode, event: Event) -> Mode:
    """The mode that follows `event` in `mode`."""
    return TRANSITIONS.get((mode, event), mode)
