"""Random and adversarial chunks through the controller's kernel, and every command judged: not one outside the limits.

    python -m benchmarks.fuzz --chunks 1000000

The adversary is that of the tests (test/control/adversary.py): seventeen kinds of chunks, from reasonable to absurd,
and whatever operators, sensors and busy machines do in between, under configurations drawn at random, half of those of
all joints with the distances between the robot's parts watched. An episode with a seed is the same anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CAPSULES = ROOT / "config" / "robots" / "g1_capsules.yaml"
sys.path[:0] = [str(ROOT / "test" / "control")]
CHUNKS_PER_EPISODE = 500


@dataclass
class Total:
    """Of all episodes; `worst` tells of the first violation."""

    chunks: int = 0
    accepted: int = 0
    commands: int = 0
    violations: int = 0
    worst: str = ""


def fuzz(chunks: int, seed: int = 0, tell=None) -> Total:
    """Plays episodes until `chunks` have gone through."""
    from adversary import play

    from vla_edge.control.capsules import CapsuleModel
    from vla_edge.control.config import ControlConfig
    from vla_edge.robots.g1 import DRIVEN_JOINTS

    total = Total()
    while total.chunks < chunks:
        rng = np.random.default_rng([seed, total.chunks])
        config = ControlConfig(
            tick_rate=int(rng.choice([500, 1000, 2000])), velocity_scale=float(rng.choice([0.05, 0.5, 1.0])),
            acceleration_scale=float(rng.choice([0.05, 0.5, 1.0])), jerk_scale=float(rng.choice([0.05, 1.0])),
            blend_time=float(rng.choice([0.02, 0.15, 0.6])), smoothing=float(rng.choice([0.0, 0.3, 1.0])),
            start_ramp=float(rng.choice([0.0, 0.5])), limit_repulsion=float(rng.choice([0.0, 0.05, 0.3])),
            reflex_time=float(rng.choice([0.0, 0.1])), reflex_yields=bool(rng.random() < 0.5),
            emergency_stop_damps=bool(rng.random() < 0.5),
        )
        count = min(CHUNKS_PER_EPISODE, chunks - total.chunks)
        # Few ticks after most chunks, so that many meet a command on the move; many after some, so that it gets far.
        joints = rng.permutation(len(DRIVEN_JOINTS))[: rng.choice([2, 4, len(DRIVEN_JOINTS)], p=[0.5, 0.4, 0.1])]
        names = tuple(DRIVEN_JOINTS[i] for i in joints)
        episode, ticks = int(rng.integers(2**32)), int(rng.choice([3, 4, 6, 40], p=[0.4, 0.3, 0.25, 0.05]))
        watched = len(names) == len(DRIVEN_JOINTS) and rng.random() < 0.5
        outcome = play(
            episode, config, count, ticks, names, CapsuleModel.from_yaml(CAPSULES, names) if watched else None
        )
        total.chunks += outcome.chunks
        total.accepted += outcome.accepted
        total.commands += outcome.commands
        total.violations += outcome.violations
        total.worst = total.worst or outcome.worst
        if tell is not None:
            tell(total)
    return total


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing got out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def tell(total: Total) -> None:
        if total.chunks % (20 * CHUNKS_PER_EPISODE) == 0:
            print(f"{total.chunks:9d} chunks, {total.commands} commands, {total.violations} outside, "
                  f"{time.monotonic() - began:.0f} s", flush=True)

    total = fuzz(options.chunks, options.seed, tell)
    print(total)
    return int(total.violations > 0)


if __name__ == "__main__":
    sys.exit(main())
