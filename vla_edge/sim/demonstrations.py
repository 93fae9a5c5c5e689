"""Demonstrations of the scripted expert, recorded for behaviour cloning.

Noise is injected on what is executed, never on what is taught (DART, Laskey et al. 2017): every frame is labelled with
the clean plan from exactly the state it shows, so the policy learns to come back. Some episodes start away from home,
and a quarter begin under another instruction, so that the goal cannot be read off the pose.

    python -m vla_edge.sim.demonstrations --episodes 1800 --out out/demonstrations
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.expert import DT, Expert
from vla_edge.sim.tasks import HANDS, TIERS, goal_id
from vla_edge.sim.world import TabletopWorld
from vla_edge.types import JointCommand, VlaEdgeError

FIRST_SEED = 1_000_000
"""Demonstrations use the seeds from here on; seeds below are for evaluation."""
IMAGE_SIZE = 96
CHUNK = 32
HOLD_STEPS = 10
"""Steps recorded after the goal is reached, to teach standing still."""
REACHED_M = {"touch": 0.03, "hard": 0.022}
PUSH_SPARE_M = 0.015
"""How near the fingertip, or the object to the end of its way, has to come before holding begins."""
EPISODES_PER_SHARD = 50
FIELDS = ("images", "state", "action", "instruction", "pointer", "episode", "step", "goal")

_NOISE_RAD, _NOISE_KEEP = (0.0, 0.03, 0.06), 0.85
_FAR_START = (0.3, 0.12)
"""Share of episodes that start away from home, and how far, rad."""
_SWITCHED = 0.25
_COMMANDS_PER_STEP = 5


class DemonstrationError(VlaEdgeError):
    """Demonstrations cannot be recorded here or read from there."""


@dataclass(frozen=True)
class Recording:
    """What identifies a recording: the same values give the same bytes of data, whatever the number of workers."""

    tier: str
    seed: int
    episodes: int
    image_size: int = IMAGE_SIZE
    chunk: int = CHUNK
    dt: float = DT
    joint_names: tuple[str, ...] = DRIVEN_JOINTS
    version: int = 1


def record(
    episodes: int,
    seed: int = FIRST_SEED,
    workers: int = 1,
    out_dir: str | Path = "out/demonstrations",
    tier: str = "touch",
    progress: bool = True,
) -> dict[str, float]:
    """Records episodes into `shard-*.npz` files; shards that are already there are kept.

    Each shard holds, over N frames: `images` (N, 96, 96, 3) uint8, `state` (N, 15) float32 rad measured, `action`
    (N, 32, 15) float32 rad absolute targets at (i + 1) * 0.05 s, `instruction` (N,) str, `pointer` (N, 2) float32 x and
    y in pixels of the named object's centre, `episode` (N,) int64 seed, `step` (N,) int32, `goal` (N,) int32 index into
    `tasks.goals()`.

    Returns:
        counts: episodes, frames, successes (the named object reached in time).

    Raises:
        DemonstrationError: the directory holds another recording.
    """
    out = Path(out_dir)
    recording = Recording(tier, int(seed), int(episodes))
    _claim(out, recording)
    blocks = [
        (
            tier,
            out / f"shard-{start // EPISODES_PER_SHARD:04d}.npz",
            tuple(range(seed + start, seed + min(start + EPISODES_PER_SHARD, episodes))),
        )
        for start in range(0, episodes, EPISODES_PER_SHARD)
    ]
    totals = {"episodes": 0, "frames": 0, "successes": 0}
    for counts in _bar(_results(blocks, workers), len(blocks), progress):
        for key in totals:
            totals[key] += counts[key]
    return totals


def shards(directory: str | Path, fields: Sequence[str] = FIELDS) -> Iterator[dict[str, np.ndarray]]:
    """The shards of a recording, in order, as name -> array, of those `fields`.

    Raises:
        DemonstrationError: there are none, or one is damaged.
    """
    for file in shard_files(directory):
        yield read_shard(file, fields)


def shard_files(directory: str | Path) -> list[Path]:
    """Of a recording, in order. Raises DemonstrationError where there are none."""
    files = sorted(Path(directory).glob("shard-*.npz"))
    if not files:
        raise DemonstrationError(
            f"{directory} holds no demonstrations; record them with `python -m vla_edge.sim.demonstrations`"
        )
    return files


def read_shard(file: Path, fields: Sequence[str] = FIELDS) -> dict[str, np.ndarray]:
    """Name -> array of those `fields`. Raises DemonstrationError where it is damaged."""
    try:
        with np.load(file) as arrays:
            return {name: arrays[name] for name in fields}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise DemonstrationError(f"{file} cannot be read ({error}); delete it and record again") from None


def joint_names(directory: str | Path) -> tuple[str, ...]:
    """Of a recording, in the order of its arrays. Raises DemonstrationError where it does not tell."""
    return _told(directory, "joint_names", tuple)


def period(directory: str | Path) -> float:
    """s between the points of a recording's chunks. Raises DemonstrationError where it does not tell."""
    return _told(directory, "dt", float)


def _told(directory: str | Path, entry: str, kind: type):
    mark = Path(directory) / "recording.json"
    try:
        return kind(json.loads(mark.read_text(encoding="utf-8"))[entry])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemonstrationError(f"{mark} cannot be read ({error}); record the demonstrations again") from None


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


_worker: dict[str, object] = {}


def _record_shard(block: tuple[str, Path, tuple[int, ...]]) -> dict[str, int]:
    tier, path, seeds = block
    if path.exists():
        with np.load(path) as shard:
            return {"episodes": len(seeds), "frames": len(shard["step"]), "successes": int(shard["successes"])}
    if not _worker:
        world = TabletopWorld()
        _worker.update(world=world, expert=Expert(world))
    gathered: dict[str, list] = {name: [] for name in FIELDS}
    successes = 0
    for seed in seeds:
        frames, reached = record_episode(_worker["world"], _worker["expert"], seed, tier)
        successes += reached
        for name in FIELDS:
            gathered[name].extend(frames[name])
    types = {"episode": np.int64, "step": np.int32, "goal": np.int32, "instruction": np.str_}
    arrays = {name: np.array(gathered[name], types.get(name)) for name in FIELDS}
    _write(path, successes=np.int64(successes), **arrays)
    return {"episodes": len(seeds), "frames": len(arrays["step"]), "successes": successes}


def _write(path: Path, **arrays) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _claim(out: Path, recording: Recording) -> None:
    """Marks a directory as belonging to one recording."""
    mark = out / "recording.json"
    wanted = json.loads(json.dumps(asdict(recording)))
    if mark.exists():
        if json.loads(mark.read_text()) != wanted:
            raise DemonstrationError(f"{out} holds another recording (see {mark}); choose another directory")
        return
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(wanted, indent=1) + "\n")


def _results(blocks, workers: int) -> Iterator[dict[str, int]]:
    if workers <= 1:
        yield from map(_record_shard, blocks)
        return
    # A fresh interpreter for each: drawing contexts do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(blocks))) as pool:
        yield from pool.imap_unordered(_record_shard, blocks)


def _bar(results, total: int, show: bool):
    from tqdm import tqdm

    return tqdm(results, total=total, desc="demonstrations", unit="shard", disable=not show)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Record demonstrations of the scripted expert.")
    parser.add_argument("--episodes", type=int, default=1800)
    parser.add_argument("--tier", choices=TIERS, default="touch")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="seed of the first episode")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("out/demonstrations"))
    options = parser.parse_args(arguments)
    try:
        totals = record(options.episodes, options.seed, options.workers, options.out, options.tier)
    except VlaEdgeError as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{totals['episodes']} episodes, {totals['frames']} frames, object reached in {totals['successes']}; "
        f"written to {options.out}"
    )


if __name__ == "__main__":
    main()
