"""Records the expert at the simulated table to a bag: what a compression is calibrated on, as a robot would bring it.

    python -m vla_edge.evaluate.calibration_bag engines/g1_tabletop/calibration

Camera frames are lossless; of every episode one in six of those that the policy saw, each episode from another on: a
compression learns more from many scenes than from many frames of a few. The seeds are used for nothing else, neither
for training nor for verifying.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vla_edge.evaluate.bag_writer import BagWriter
from vla_edge.evaluate.closed_loop import LoopOptions, as_engine, run_episode
from vla_edge.evaluate.expert_policy import ExpertPolicy
from vla_edge.evaluate.tabletop_rig import TabletopRig
from vla_edge.sim.tasks import TIERS
from vla_edge.types import NANOSECONDS, JointState, Observation, VlaEdgeError

# Between those of evaluations, which count from 0, and those of demonstrations, which count from 1,000,000.
FIRST_SEED = 900_000
EPISODES, EVERY = 80, 6
# After success the hand stays: that, too, is something the policy has to do, and the motion after each frame is seen.
STAY_S = 1.0
# Episodes lie one after another on one clock, with a pause that no chunk spans.
PAUSE_NS = 3 * NANOSECONDS
JOINT_STATE_HZ = 50


class RecordingRig(TabletopRig):
    """The tabletop, writing what a robot's recorder would: frames, joint states, commands and the instruction."""

    def __init__(self, writer: BagWriter, every: int = 1):
        super().__init__()
        self._writer, self._every = writer, every
        self._log_ns = NANOSECONDS
        self._next_ns = self._last_ns = 0
        self.frames = 0

    def begin(self, seed: int, options: LoopOptions) -> str:
        self._log_ns += PAUSE_NS
        instruction = super().begin(seed, options)
        self._shift_ns = self._log_ns - self.now_ns
        self._until_frame = seed % self._every
        self._next_ns = self._log_ns
        self._writer.instruction(self._log_ns, instruction)
        return instruction

    def finished(self) -> bool:
        if not super().finished():
            self._end_ns = self.now_ns + round(STAY_S * NANOSECONDS)
            return False
        return self.now_ns >= self._end_ns

    def observe(self, instruction: str) -> Observation:
        observation = super().observe(instruction)
        self._record_joints(observation.joints)
        if self._until_frame == 0:
            self._writer.image(observation.stamp_ns + self._shift_ns, "head", observation.images["head"])
            self._until_frame, self.frames = self._every, self.frames + 1
        self._until_frame -= 1
        return observation

    def tick(self, seconds: float) -> None:
        state = self._joints()
        if state.stamp_ns + self._shift_ns >= self._next_ns:
            self._record_joints(state)
        super().tick(seconds)
        self._log_ns = self.now_ns + self._shift_ns

    def _record_joints(self, state: JointState) -> None:
        stamp = state.stamp_ns + self._shift_ns
        if stamp <= self._last_ns:
            return
        self._last_ns = stamp
        self._writer.joints(replace(state, stamp_ns=stamp))
        self._next_ns = stamp + NANOSECONDS // JOINT_STATE_HZ


def record(
    path: str | Path, seeds: Iterable[int], tiers: Sequence[str] = TIERS, rate_hz: float = 5.0, every: int = 1,
    progress=None,
) -> int:
    """Records one expert episode of each tier for each seed; returns the number of frames.

    The expert sees `rate_hz` frames a second; one in `every` is written, an episode's first by its seed.

    Raises:
        BagError: something is at `path` already.
    """
    seeds = list(seeds)
    about = {
        "source": "expert in simulation", "tiers": ", ".join(tiers), "seeds": f"{seeds[0]} to {seeds[-1]}",
    }  # fmt: skip
    with BagWriter(path, image_format="png", compression="chunk", metadata=about) as writer:
        rig = RecordingRig(writer, every)
        expert = as_engine(ExpertPolicy(), rig)
        # tiers one after the other: of alternating ones, every fourth episode would be of one tier alone
        for tier in tiers:
            for seed in seeds:
                row = run_episode(rig, expert, seed, LoopOptions(tier=tier, rate_hz=rate_hz))
                if progress is not None:
                    progress(row)
    return rig.frames


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vla_edge.evaluate.calibration_bag", description=__doc__)
    parser.add_argument("output", type=Path, help="directory of the bag to write")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of each tier")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tiers", nargs="+", default=TIERS, choices=TIERS)
    parser.add_argument("--rate", type=float, default=5.0, help="frames a second that the expert sees")
    parser.add_argument("--every", type=int, default=EVERY, help="write one in so many of them")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.episodes)
    outcomes: list[bool] = []

    def tell(row) -> None:
        outcomes.append(row.success)
        print(f"seed {row.seed}: {row.instruction}: {'success' if row.success else 'failed'}", file=sys.stderr)

    try:
        frames = record(options.output, seeds, options.tiers, options.rate, options.every, tell)
    except VlaEdgeError as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in options.output.iterdir())
    done = f"{sum(outcomes)}/{len(outcomes)} episodes succeeded"
    print(f"{options.output}: {frames} frames, {done}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
