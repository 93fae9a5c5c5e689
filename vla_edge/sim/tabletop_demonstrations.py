"""Demonstrations at the tabletop, by its scripted expert.

Noise is injected on what is executed, never on what is taught (DART, Laskey et al. 2017): every frame is labelled with
the clean plan from exactly the state it shows, so the policy learns to come back. Some episodes start away from home,
and a quarter begin under another instruction, so that the goal cannot be read off the pose.
"""

from __future__ import annotations

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.demonstrations import FIELDS
from vla_edge.sim.expert import DT, Expert
from vla_edge.sim.tasks import HANDS, goal_id
from vla_edge.sim.world import TabletopWorld
from vla_edge.types import JointCommand

IMAGE_SIZE = 96
CHUNK = 32
HOLD_STEPS = 10
"""Steps recorded after the goal is reached, to teach standing still."""
REACHED_M = {"touch": 0.03, "hard": 0.022}
PUSH_SPARE_M = 0.015
"""How near the fingertip, or the object to the end of its way, has to come before holding begins."""

_NOISE_RAD, _NOISE_KEEP = (0.0, 0.03, 0.06), 0.85
_FAR_START = (0.3, 0.12)
"""Share of episodes that start away from home, and how far, rad."""
_SWITCHED = 0.25
_COMMANDS_PER_STEP = 5


class TabletopDemonstrator:
    """See `demonstrations.Demonstrator`."""

    def __init__(self):
        self._world = TabletopWorld()
        self._expert = Expert(self._world)

    def __call__(self, seed: int, tier: str) -> tuple[dict[str, list], bool]:
        return record_episode(self._world, self._expert, seed, tier)


def record_episode(world: TabletopWorld, expert: Expert, seed: int, tier: str) -> tuple[dict[str, list], bool]:
    """One demonstration: lists of per-frame values by field, and whether the object was reached in time."""
    rng = np.random.default_rng([seed, 7])
    far_share, far_sigma = _FAR_START
    episode = world.reset(seed, tier, far_sigma if rng.random() < far_share else 0.03)
    goal, switch = episode.goal, 0
    if rng.random() < _SWITCHED:
        switch = int(rng.integers(3, 15))
        world.ask(_pick(rng, [other for other in episode.goals if other != goal]))
    sigma = _pick(rng, _NOISE_RAD)
    noise = rng.normal(0.0, sigma, len(DRIVEN_JOINTS))
    frames: dict[str, list] = {name: [] for name in FIELDS}
    instruction = _pick(rng, world.episode.goal.wordings)
    limit = switch + round(episode.time_limit_s / DT)
    step, left, row, rows, plan, target = 0, HOLD_STEPS, 0, 0, None, world.joint_state().position
    reached = False
    while step < limit + HOLD_STEPS and left > 0:
        if step == switch and world.episode.goal != goal:
            world.ask(goal)
            instruction, rows = _pick(rng, goal.wordings), 0
        _append(frames, world, expert, instruction, seed, step)
        if row >= rows:
            # As on the robot, a plan is followed for a while before a newer one takes over.
            # Planned from where it would be without noise: the noise displaces the motion, it does not add up.
            rows = int(rng.integers(1, 9))
            plan, row = expert.plan(rows, start=world.joint_state().position - noise), 0
        noise = _NOISE_KEEP * noise + np.sqrt(1 - _NOISE_KEEP**2) * rng.normal(0.0, sigma, len(noise))
        target = _execute(world, target, plan[row] + noise)
        row, step = row + 1, step + 1
        if step > switch:
            reached = reached or _done(world, expert)
            left -= reached
    frames["action"] = _label(expert, frames["action"])
    return frames, reached


def _append(frames: dict[str, list], world: TabletopWorld, expert: Expert, instruction: str, seed: int, step: int):
    frames["images"].append(world.render(IMAGE_SIZE, IMAGE_SIZE))
    frames["state"].append(world.joint_state().position.astype(np.float32))
    frames["action"].append((world.joint_state().position, expert.situation(), world.episode.goal))
    frames["instruction"].append(instruction)
    frames["pointer"].append(world.project(world.object_centre(), IMAGE_SIZE, IMAGE_SIZE).astype(np.float32))
    frames["episode"].append(seed)
    frames["step"].append(step)
    frames["goal"].append(goal_id(world.episode.goal))


def _label(expert: Expert, situations: list[tuple]) -> list[np.ndarray]:
    """The clean plan from each (joints, situation, goal), those of one goal together: far faster than one by one."""
    labels: list[np.ndarray] = [None] * len(situations)  # type: ignore[list-item]
    for goal in {situation[2] for situation in situations}:
        index = [i for i, situation in enumerate(situations) if situation[2] == goal]
        starts = np.array([situations[i][0] for i in index])
        for i, plan in zip(index, expert.plan_batch(starts, [situations[i][1] for i in index], CHUNK, goal)):
            labels[i] = plan.astype(np.float32)
    return labels


def _execute(world: TabletopWorld, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Moves the targets from `start` to `end` (15,) in one DT."""
    effort = np.zeros(len(end))
    for part in range(1, _COMMANDS_PER_STEP + 1):
        position = start + (end - start) * (part / _COMMANDS_PER_STEP)
        world.apply(JointCommand(world.time_ns, DRIVEN_JOINTS, position, (end - start) / DT, effort))
        world.step(DT / _COMMANDS_PER_STEP)
    return end


def _done(world: TabletopWorld, expert: Expert) -> bool:
    """Whether the goal is reached with something to spare, whatever was touched before."""
    goal = world.episode.goal
    if goal.place is not None:
        situation = expert.situation()
        return bool((situation.wanted_y[0] - situation.centre[0, 1]) * situation.side < PUSH_SPARE_M)
    tip = world.fingertips()[HANDS.index(goal.hand)]
    return bool(np.linalg.norm(tip - world.touch_point()) < REACHED_M[world.episode.tier])


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]
