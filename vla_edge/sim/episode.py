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
    "hard": ((0.335, 0.145), (0.335, 0.0), (0.335, -0.145), (0.45, 0.14), (0.45, 0.0), (0.45, -0.14)),
}
JITTER = {"touch": 0.018, "hard": 0.01}
"""m, uniform, in x and y."""
TIME_LIMIT_S = {"touch": 4.0, "hard": 5.0}
NEAR_COLOURS = (("red", "orange"), ("orange", "yellow"), ("yellow", "green"), ("blue", "purple"))
_DOMINOES = (((0, 3), (1, 4), (2, 5)), ((0, 3), (1, 2), (4, 5)), ((0, 1), (3, 4), (2, 5)))
"""The ways in which six slots in two rows fall into pairs of neighbours."""


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
        """Probability of doing the right thing by doing any one thing that could be asked of the picture."""
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
    possible = tuple(goal for index, item in enumerate(objects) for goal in _goals_of(tier, index, item))
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
    """(colour, shape) per slot: each object has a neighbour of its colour in the other shape, or of its shape in a
    colour close to its own."""
    while True:
        kinds: dict[int, tuple[str, str]] = {}
        for first, second in _DOMINOES[rng.integers(len(_DOMINOES))]:
            if rng.random() < 0.5:
                colour = str(rng.choice(COLOURS["hard"]))
                pair = [(colour, shape) for shape in SHAPES]
            else:
                shape = str(rng.choice(SHAPES))
                pair = [(colour, shape) for colour in NEAR_COLOURS[rng.integers(len(NEAR_COLOURS))]]
            order = rng.permutation(2)
            kinds[first], kinds[second] = pair[order[0]], pair[order[1]]
        if len(set(kinds.values())) == len(kinds):
            return [kinds[slot] for slot in range(len(kinds))]


def _goals_of(tier: str, slot: int, item: TabletopObject) -> list[Goal]:
    """What can be asked of an object: an outer one is not pushed inwards by the hand of the other side, which would
    have to reach around it."""
    goals = [Goal(item.colour, item.shape, hand) for hand in HANDS]
    if tier == "hard":
        column = ("left", None, "right")[slot % 3]
        goals += [
            Goal(item.colour, item.shape, hand, place)
            for hand in HANDS
            for place in PLACES
            if not (column is not None and place != column and hand != column)
        ]
    return goals
