"""What the robot can be asked to do at the table, and in which words.

Two tiers. `touch`: put the named hand on the named object. `hard`: the same to a finer tolerance among look-alikes,
and pushing a named object to a named side. Whether it was done is judged in `judge.py`, from the state of the physics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vla_edge.types import VlaEdgeError

TIERS = ("touch", "hard")
HANDS = ("left", "right")
SHAPES = ("cube", "ball")
PLACES = ("left", "right")
COLOURS = {"touch": ("red", "green", "blue", "yellow"), "hard": ("red", "orange", "yellow", "green", "blue", "purple")}
"""Colours in use, by tier."""

TOUCH_WORDINGS = (
    "touch the {colour} {shape} with your {hand} hand",
    "put your {hand} hand on the {colour} {shape}",
    "use your {hand} hand to touch the {colour} {shape}",
    "reach for the {colour} {shape} with the {hand} hand",
    "with your {hand} hand touch the {colour} {shape}",
    "place the {hand} hand on the {colour} {shape}",
)
PUSH_WORDINGS = (
    "push the {colour} {shape} to the {place} with your {hand} hand",
    "use your {hand} hand to push the {colour} {shape} {place}",
    "slide the {colour} {shape} to the {place} with the {hand} hand",
    "with your {hand} hand move the {colour} {shape} to the {place}",
)


class TaskError(VlaEdgeError):
    """A tier or a goal that does not exist."""


@dataclass(frozen=True, order=True)
class Goal:
    """One thing to do.

    Attributes:
        colour, shape: of the object.
        hand: "left" or "right", the robot's own.
        place: None to touch it; "left" or "right", as the robot sees it, to push it there.
    """

    colour: str
    shape: str
    hand: str
    place: str | None = None

    @property
    def name(self) -> str:
        """Short and unique, for reports: "red cube, left hand"."""
        push = f" to the {self.place}" if self.place else ""
        return f"{self.colour} {self.shape}{push}, {self.hand} hand"

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every instruction that means this goal."""
        words = {"colour": self.colour, "shape": self.shape, "hand": self.hand, "place": self.place}
        return tuple(w.format(**words) for w in (PUSH_WORDINGS if self.place else TOUCH_WORDINGS))


@dataclass(frozen=True)
class Outcome:
    """How an attempt at one goal stands, from the state of the physics alone.

    Attributes:
        goal: what was attempted.
        success: the goal was reached in time and nothing else was touched first.
        wrong_first: another object was touched, or the other hand touched, before the named hand met the named object.
        touched: the first touch, "left hand: red cube", or None.
        time_s: when the goal was reached, else the time passed, since the reset.
        min_distance_m: least distance so far of the named fingertip to the named object's touch point; for a push,
            the least way the object still had to go.
    """

    goal: Goal
    success: bool
    wrong_first: bool
    touched: str | None
    time_s: float
    min_distance_m: float


@lru_cache
def goals(tier: str | None = None) -> tuple[Goal, ...]:
    """All goals of a tier, or of both; a goal's position in `goals()` is its id."""
    if tier is None:
        return tuple(dict.fromkeys(goal for each in TIERS for goal in goals(each)))
    if tier not in TIERS:
        raise TaskError(f"there is no tier {tier!r}; it is one of {', '.join(TIERS)}")
    places = (None,) if tier == "touch" else (None, *PLACES)
    return tuple(
        Goal(colour, shape, hand, place)
        for place in places
        for colour in COLOURS[tier]
        for shape in SHAPES
        for hand in HANDS
    )


def goal_id(goal: Goal) -> int:
    """Index into `goals()`."""
    return goals().index(goal)


@lru_cache
def _by_wording() -> dict[str, Goal]:
    return {text: goal for goal in goals() for text in goal.wordings}


def parse_instruction(text: str) -> Goal:
    """The goal an instruction means; case and outer spaces do not matter.

    Raises:
        TaskError: no goal is worded like this.
    """
    try:
        return _by_wording()[" ".join(text.lower().split()).rstrip(".!")]
    except KeyError:
        raise TaskError(
            f"{text!r} is no instruction the tabletop can judge; say it like {TOUCH_WORDINGS[0]!r} "
            f"or {PUSH_WORDINGS[0]!r}"
        ) from None


def vocabulary() -> tuple[str, ...]:
    """Every word of every instruction of both tiers, sorted."""
    return tuple(sorted({word for text in _by_wording() for word in text.split()}))
