"""One episode: what stands on the table, and what is asked. Drawn from a seed, the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_edge.sim.tasks import COLOURS, HANDS, PLACES, SHAPES, TIERS, Goal, TaskError

OBJECTS = {"touch": 4, "hard": 6}
CUBE_HALF = 0.03
"""m, half the edge of a cube."""
BALL_RADIUS = 0.033
"""m."""
TABLE_TOP = 0.72
"""m, height of the table above the floor."""

# Centres of the places where objects stand, m, in the world: x ahead of the robot, y to its left.
SLOTS = {
    "touch": ((0.34, 0.075), (0.34, -0.075), (0.465, 0.08), (0.465, -0.08)),
    "hard": ((0.34, 0.13), (0.34, 0.0), (0.34, -0.13), (0.48, 0.13), (0.48, 0.0), (0.48, -0.13)),
}
JITTER = {"touch": 0.018, "hard": 0.012}
"""m, uniform, in x and y."""
TIME_LIMIT_S = {"touch": 4.0, "hard": 5.0}
LOOK_ALIKE = {"red": "orange", "orange": "red", "yellow": "orange", "green": "yellow", "blue": "purple", "purple": "blue"}


@dataclass(frozen=True)
class TabletopObject:
    """An object and where it starts.

    Attributes:
        colour, shape: its name in an instruction.
        position: of its centre, m, world.
        yaw: rad about the vertical.
    """

    colour: str
    shape: str
    position: tuple[float, float, float]
    yaw: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def half_height(self) -> float:
        """m, from its centre to its top."""
        return CUBE_HALF if self.shape == "cube" else BALL_RADIUS


@dataclass(frozen=True)
class Episode:
    """A scene and a request.

    Attributes:
        seed, tier: what it was drawn from.
        objects: in the order of the world's object bodies.
        goal: what is asked.
        instruction: in words.
        goals: everything that could be asked of the same picture, `goal` among it.
        time_limit_s: s of world time.
        start_offset: (15,) rad added to the home pose at the start.
    """

    seed: int
    tier: str
    objects: tuple[TabletopObject, ...]
    goal: Goal
    instruction: str
    goals: tuple[Goal, ...]
    time_limit_s: float
    start_offset: tuple[float, ...]

    @property
    def chance(self) -> float:
        """Probability that one who ignores the instruction, but does something that could be asked, does the right thing."""
        return 1.0 / len(self.goals)

    def object_index(self, goal: Goal) -> int:
        """Position in `objects` of what a goal names.

        Raises:
            TaskError: it is not on the table.
        """
        for index, item in enumerate(self.objects):
            if (item.colour, item.shape) == (goal.colour, goal.shape):
                return index
        names = ", ".join(item.name for item in self.objects)
        raise TaskError(f"there is no {goal.colour} {goal.shape} on the table (seed {self.seed}); there are {names}")


def draw_episode(seed: int, tier: str = "touch", start_sigma: float = 0.02, joints: int = 15) -> Episode:
    """Draws an episode.

    Args:
        seed: same seed, same episode.
        start_sigma: rad, spread of the starting pose about home.

    Raises:
        TaskError: no such tier.
    """
    if tier not in TIERS:
        raise TaskError(f"there is no tier {tier!r}; it is one of {', '.join(TIERS)}")
    rng = np.random.default_rng([TIERS.index(tier), int(seed)])
    kinds = _kinds(rng) if tier == "touch" else _look_alike_kinds(rng)
    objects = []
    for (colour, shape), (x, y) in zip(kinds, SLOTS[tier]):
        dx, dy = rng.uniform(-JITTER[tier], JITTER[tier], 2)
        height = CUBE_HALF if shape == "cube" else BALL_RADIUS
        position = (float(x + dx), float(y + dy), TABLE_TOP + height)
        objects.append(TabletopObject(colour, shape, position, float(rng.uniform(-0.4, 0.4))))
    offset = np.clip(rng.normal(0.0, start_sigma, joints), -3 * start_sigma, 3 * start_sigma)
    possible = tuple(
        Goal(item.colour, item.shape, hand, place)
        for item in objects
        for hand in HANDS
        for place in ((None,) if tier == "touch" else (None, *PLACES))
    )
    goal = possible[rng.integers(len(possible))]
    instruction = goal.wordings[rng.integers(len(goal.wordings))]
    return Episode(
        int(seed), tier, tuple(objects), goal, instruction, possible, TIME_LIMIT_S[tier], tuple(map(float, offset))
    )


def _kinds(rng: np.random.Generator) -> list[tuple[str, str]]:
    """(colour, shape) per slot: every colour once, shapes free but both present."""
    colours = rng.permutation(COLOURS["touch"])
    shapes = [str(rng.choice(SHAPES)) for _ in colours]
    if len(set(shapes)) == 1:
        shapes[rng.integers(len(shapes))] = SHAPES[1 - SHAPES.index(shapes[0])]
    return [(str(colour), shape) for colour, shape in zip(colours, shapes)]


def _look_alike_kinds(rng: np.random.Generator) -> list[tuple[str, str]]:
    """(colour, shape) per slot: every object has a neighbour it can be mistaken for.

    Rows of three: somewhere a colour stands beside itself in the other shape, and beside a near colour in its shape.
    """
    raise NotImplementedError
