"""Run a checkpoint of ours by LeRobot and by vla_edge on the same observations, and print the largest difference.

    PYTHONPATH=. python tools/parity/check_checkpoint.py engines/g1_tabletop/checkpoint

In a LeRobot environment (doc/parity.md), offline. Both sides go all the way from camera frame, joint positions and
instruction to joint targets, each through what it reads from the directory alone; only the noise is shared. Exits with
1 when a target differs by more than the tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from generate_smolvla import picture
from lerobot_offline import LeRobotSmolVLA
from tokenizers import Tokenizer

from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import Checkpoint, load_checkpoint, load_policy
from vla_edge.types import JointState, Observation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--observations", type=int, default=20)
    parser.add_argument("--instruction", action="append", help="repeatable; random words of the vocabulary if left out")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="rad, of any joint at any time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(arguments.checkpoint)
    ours, reference = Runner.from_policy(load_policy(checkpoint), checkpoint), LeRobotSmolVLA(arguments.checkpoint)
    rng = np.random.default_rng(arguments.seed)
    largest, moved, changed, previous = 0.0, [], [], None
    for observation in observations(checkpoint, arguments.instruction, arguments.observations, rng):
        noise = rng.standard_normal(ours.noise_shape, dtype=np.float32)
        theirs = targets(reference, checkpoint, observation, noise)
        chunk = ours.infer(observation, noise=noise).chunk
        largest = max(largest, float(np.abs(chunk.positions - theirs).max()))
        motion = theirs - observation.joints.position
        moved.append(motion.std())
        if previous is not None:
            changed.append(np.abs(motion - previous).mean())
        previous = motion
    apart = np.mean(changed) if changed else float("nan")
    print(
        f"{arguments.observations} observations, {theirs.shape[0]} points of {theirs.shape[1]} joints, "
        f"{ours.num_steps} flow steps\n"
        f"largest difference {largest:.2e} rad (allowed {arguments.tolerance:.0e})\n"
        f"for scale: a motion's standard deviation is {np.mean(moved):.3f} rad, "
        f"and the motions of two observations are {apart:.3f} rad apart on average"
    )
    return 0 if largest <= arguments.tolerance else 1


def observations(
    checkpoint: Checkpoint, instructions: list[str] | None, count: int, rng: np.random.Generator
) -> Iterator[Observation]:
    """Structured pictures, positions as spread as the training's, and instructions in words the tokenizer knows."""
    spec = checkpoint.spec
    vocabulary = Tokenizer.from_file(str(checkpoint.tokenizer_path)).get_vocab()
    words = sorted(word for word in vocabulary if word.isalpha())
    for index in range(count):
        text = instructions[index % len(instructions)] if instructions else " ".join(rng.choice(words, 8))
        frames = {c.name: picture(c.source_height, c.source_width, rng) for c in spec.cameras}
        spread = rng.normal(0, 1, len(spec.joint_names)).astype(np.float32)
        # LeRobot holds positions in float32, so that is what both are given
        positions = spec.state.unnormalize(spread).astype(np.float32)
        yield Observation(0, frames, JointState(0, spec.joint_names, positions), text)


def targets(
    reference: LeRobotSmolVLA, checkpoint: Checkpoint, observation: Observation, noise: np.ndarray
) -> np.ndarray:
    """(T, J) rad absolute, by LeRobot; crop and offsets are ours to add, as LeRobot knows neither."""
    cropped = {}
    for camera in checkpoint.spec.cameras:
        y, x, height, width = camera.crop
        cropped[camera.key] = observation.images[camera.name][y : y + height, x : x + width]
    positions = observation.joints.position
    actions = reference.predict(cropped, positions, observation.instruction, noise).actions[0].astype(np.float64)
    return actions + positions if checkpoint.spec.relative_actions else actions


if __name__ == "__main__":
    sys.exit(main())
