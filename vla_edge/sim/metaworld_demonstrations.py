"""Demonstrations of Meta-World's scripted experts.

Noise is injected on what is executed, never on what is taught (DART, Laskey et al. 2017). An expert here is a law of
feedback and has no plan to tell, so an episode begins with a spell of noise, and what the expert does after it, without
noise, are the labels of the frames after it: again the clean plan from exactly the state that is shown.
"""

from __future__ import annotations

import numpy as np

from vla_edge.sim.demonstrations import FIELDS
from vla_edge.sim.metaworld import PICTURE, STEP_NS, STRIDE_M, TASKS, MetaWorld
from vla_edge.types import NANOSECONDS

ROW_STEPS = 4
"""Steps of the environment between points of a chunk."""
DT = ROW_STEPS * STEP_NS / NANOSECONDS
CHUNK = 16
CROP = (21, 27, 64, 64)
"""The part of the picture in which hands and objects of the tasks move: top, left, height, width, px."""
HOLD_FRAMES = 2
"""Recorded after the goal is reached."""
LAST_STEP = 320
"""Of the environment, after which no frame is recorded: an expert that has not come there by then has failed."""

_NOISE, _NOISE_KEEP = (0.2, 0.4, 0.8), 0.9
"""Of the action, whose range is -1 to 1; each step keeps so much of the noise of the step before."""
_LONGEST_SPELL = 80
"""Steps of the environment; experts take about 60 to 90 for a task."""


class MetaWorldDemonstrator:
    """See `demonstrations.Demonstrator`."""

    def __init__(self):
        self._world = MetaWorld()

    def __call__(self, seed: int, tier: str) -> tuple[dict[str, list], bool]:
        return record_episode(self._world, seed, tier)


def record_episode(world: MetaWorld, seed: int, tier: str) -> tuple[dict[str, list], bool]:
    """One demonstration: lists of per-frame values by field, and whether the task was done in time."""
    episode, rng = world.reset(seed, tier), np.random.default_rng([seed, 7])
    _disturb(world, rng)
    instruction = str(rng.choice(TASKS[episode.task]))
    frames: dict[str, list] = {name: [] for name in FIELDS}
    targets, left = [], HOLD_FRAMES
    while left > 0 and world.steps < LAST_STEP:
        if len(targets) % ROW_STEPS == 0:
            left -= world.success
            _append(frames, world, instruction, seed, len(targets) // ROW_STEPS)
        _follow(world, targets)
    reached = world.success
    for _ in range(CHUNK * ROW_STEPS):
        _follow(world, targets)
    frames["action"] = [_label(targets, step * ROW_STEPS) for step in frames["step"]]
    return frames, reached


def _disturb(world: MetaWorld, rng: np.random.Generator) -> None:
    """Lets the expert begin under noise, for a while."""
    sigma, noise = rng.choice(_NOISE), np.zeros(3)
    for _ in range(int(rng.integers(_LONGEST_SPELL))):
        noise = _NOISE_KEEP * noise + np.sqrt(1 - _NOISE_KEEP**2) * rng.normal(0.0, sigma, 3)
        target = world.expert_target()
        target[:3] += STRIDE_M * noise
        world.step(target)
        if world.success:
            break


def _follow(world: MetaWorld, targets: list[np.ndarray]) -> None:
    targets.append(world.expert_target())
    world.step(targets[-1])


def _append(frames: dict[str, list], world: MetaWorld, instruction: str, seed: int, step: int) -> None:
    top, left, height, width = CROP
    frames["images"].append(world.render(PICTURE, PICTURE)[top : top + height, left : left + width])
    frames["state"].append(world.joint_state().position.astype(np.float32))
    frames["instruction"].append(instruction)
    frames["pointer"].append((world.object_pixel(PICTURE, PICTURE) - (left, top)).astype(np.float32))
    frames["episode"].append(seed)
    frames["step"].append(step)
    frames["goal"].append(list(TASKS).index(world.episode.task))


def _label(targets: list[np.ndarray], now: int) -> np.ndarray:
    """(CHUNK, 4) float32 m: where the target is at (i + 1) * DT from step `now` on."""
    return np.array(targets[now + ROW_STEPS - 1 : now + CHUNK * ROW_STEPS : ROW_STEPS], np.float32)
