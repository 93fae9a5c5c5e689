"""Demonstrations of a scripted expert, recorded for behaviour cloning.

    python -m vla_edge.sim.demonstrations --episodes 1800 --out out/demonstrations
    python -m vla_edge.sim.demonstrations --world metaworld --episodes 600 --out out/demonstrations/metaworld
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
from typing import Protocol
from zipfile import BadZipFile

import numpy as np

from vla_edge.sim.worlds import WORLDS, world
from vla_edge.types import VlaEdgeError

FIRST_SEED = 1_000_000
"""Demonstrations use the seeds from here on; seeds below are for evaluation."""
EPISODES_PER_SHARD = 50
FIELDS = ("images", "state", "action", "instruction", "pointer", "episode", "step", "goal")


class DemonstrationError(VlaEdgeError):
    """Demonstrations cannot be recorded here or read from there."""


@dataclass(frozen=True)
class Recording:
    """What identifies a recording: the same values give the same bytes of data, whatever the number of workers."""

    world: str
    tier: str
    seed: int
    episodes: int
    image_size: int
    chunk: int
    dt: float
    joint_names: tuple[str, ...]
    version: int = 1


class Demonstrator(Protocol):
    """A world and its expert, as `World.demonstrator` makes them."""

    def __call__(self, seed: int, tier: str) -> tuple[dict[str, list], bool]:
        """One demonstration: lists of per-frame values by field, and whether the goal was reached in time."""


def record(
    episodes: int,
    seed: int = FIRST_SEED,
    workers: int = 1,
    out_dir: str | Path = "out/demonstrations",
    tier: str | None = None,
    progress: bool = True,
    world_name: str = "tabletop",
) -> dict[str, float]:
    """Records episodes into `shard-*.npz` files; shards that are already there are kept.

    Each shard holds, over N frames of J joints and T points: `images` (N, H, W, 3) uint8, as the network sees them;
    `state` (N, J) float32 measured, in the unit of the world's joints; `action` (N, T, J) float32 absolute targets at
    (i + 1) * dt; `instruction` (N,) str; `pointer` (N, 2) float32 x and y in pixels of the named object's centre;
    `episode` (N,) int64 seed; `step` (N,) int32 of dt; `goal` (N,) int32, the index among the world's goals.

    Args:
        tier: of the world; its first when None.
        world_name: one of `worlds.WORLDS`.

    Returns:
        counts: episodes, frames, successes (the goal reached in time).

    Raises:
        WorldError: there is no such world or tier.
        AssetError, MetaWorldError: what the world needs is not installed.
        DemonstrationError: the directory holds another recording.
    """
    out, shown = Path(out_dir), world(world_name)
    tier = shown.tier(tier)
    shown.needed()
    recording = Recording(
        world_name, tier, int(seed), int(episodes), shown.camera.height, shown.chunk, shown.dt, shown.joint_names
    )
    _claim(out, recording)
    blocks = [
        (
            world_name,
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


def read_mark(directory: str | Path) -> dict:
    """What a recording says of itself: the fields of `Recording`; recordings from before there were several worlds are
    of the tabletop.

    Raises:
        DemonstrationError: there is none, or it does not tell its joints.
    """
    shard_files(directory)
    mark = Path(directory) / "recording.json"
    try:
        said = json.loads(mark.read_text(encoding="utf-8"))
        return {"world": "tabletop", **said, "joint_names": tuple(said["joint_names"]), "dt": float(said["dt"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemonstrationError(f"{mark} cannot be read ({error}); record the demonstrations again") from None


_worker: dict[str, Demonstrator] = {}


def _record_shard(block: tuple[str, str, Path, tuple[int, ...]]) -> dict[str, int]:
    world_name, tier, path, seeds = block
    if path.exists():
        with np.load(path) as shard:
            return {"episodes": len(seeds), "frames": len(shard["step"]), "successes": int(shard["successes"])}
    if world_name not in _worker:
        _worker[world_name] = world(world_name).demonstrator()
    gathered: dict[str, list] = {name: [] for name in FIELDS}
    successes = 0
    for seed in seeds:
        frames, reached = _worker[world_name](seed, tier)
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
        if {"world": "tabletop", **json.loads(mark.read_text())} != wanted:
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
    parser = argparse.ArgumentParser(description="Record demonstrations of a scripted expert.")
    parser.add_argument("--episodes", type=int, default=1800)
    parser.add_argument("--world", choices=WORLDS, default="tabletop")
    parser.add_argument("--tier", help="of the world; its first when left out")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="seed of the first episode")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("out/demonstrations"))
    options = parser.parse_args(arguments)
    try:
        totals = record(
            options.episodes, options.seed, options.workers, options.out, options.tier, world_name=options.world
        )
    except VlaEdgeError as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{totals['episodes']} episodes, {totals['frames']} frames, goal reached in {totals['successes']}; "
        f"written to {options.out}"
    )


if __name__ == "__main__":
    main()
