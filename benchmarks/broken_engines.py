"""Engines broken on purpose, each in one of the ways in which engines do break, to see whether acceptance finds out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vla_edge.engine.runner import Runner
from vla_edge.policy.preprocess import positions_by_name

# Swapped in a swapped engine: the arm lifts and bends by them.
SWAPPED = ("right_shoulder_pitch_joint", "right_elbow_joint")
# What another data set's statistics may look like beside the right ones.
STALE_SCALE, STALE_SHIFT = 1.25, 0.1


@dataclass(frozen=True)
class Broken:
    """One engine.

    Attributes:
        name: what was done to it. policy: a `Runner`, or one in disguise.
        limit: the first of the limits that has to break. innocent: limits of other mistakes, which have to hold; those
            of timing are not among them, since a machine may be slow for reasons of its own.
    """

    name: str
    policy: object
    limit: str
    innocent: tuple[str, ...]


def broken_engines(checkpoint: str | Path, directory: str | Path) -> Iterator[Broken]:
    """One after the other, so that only one is in memory.

    Args:
        directory: for the altered checkpoints.
    """
    source, directory = Path(checkpoint), Path(directory)
    for stage in ("vision", "prefix", "denoise"):
        yield Broken(
            f"stage {stage} at 2 bits", two_bits(source, stage), "action_error_rel",
            ("exchanged_joints", "normalization", "state_outside"),
        )  # fmt: skip
    swapped = swap_joints(source, directory / "swapped")
    yield Broken(
        "swapped joint names", Runner.from_checkpoint(swapped), "exchanged_joints",
        ("normalization",),
    )  # fmt: skip
    yield Broken(
        "swapped joint outputs", swap_outputs(source), "exchanged_joints",
        ("normalization", "state_outside"),
    )  # fmt: skip
    stale = stale_statistics(source, directory / "stale")
    yield Broken(
        "stale statistics", Runner.from_checkpoint(stale), "normalization",
        ("exchanged_joints",),
    )  # fmt: skip
    yield Broken(
        "half a second of added latency", Late(Runner.from_checkpoint(source), 0.5), "latency_p99_ms",
        ("exchanged_joints", "normalization", "state_outside", "action_error_rel", "error_over_hold"),
    )  # fmt: skip


def two_bits(checkpoint: Path, stage: str) -> Runner:
    """Every matrix of one stage rounded to -1, 0 and 1 times a scale for each of its rows."""
    import torch

    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    loaded = load_checkpoint(checkpoint)
    policy = load_policy(loaded)
    with torch.no_grad():
        for module in getattr(policy, stage).modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().amax(dim=1, keepdim=True)
                module.weight.copy_((module.weight / scale).round() * scale)
    return Runner.from_policy(policy, loaded)


def swap_joints(checkpoint: Path, copy: Path, pair: tuple[str, str] = SWAPPED) -> Path:
    """A checkpoint that calls each of two joints by the other's name."""
    shutil.copytree(checkpoint, copy)
    path = copy / "vla_edge.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    other = dict(zip(pair, reversed(pair)))
    content["joint_names"] = [other.get(name, name) for name in content["joint_names"]]
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return copy


def swap_outputs(checkpoint: Path, pair: tuple[str, str] = SWAPPED) -> Exchanged:
    """The policy with the targets of two joints in each other's place."""
    runner = Runner.from_checkpoint(checkpoint)
    return Exchanged(runner, [runner.spec.joint_names.index(name) for name in pair])


def stale_statistics(checkpoint: Path, copy: Path) -> Path:
    """A checkpoint with the statistics of actions of another data set."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, copy)
    for path in copy.glob("policy_*processor_step_*.safetensors"):
        tensors = load_file(path)
        tensors["action.mean"] = np.float32(tensors["action.mean"] + STALE_SHIFT * tensors["action.std"])
        tensors["action.std"] = np.float32(STALE_SCALE * tensors["action.std"])
        save_file(tensors, path)
    return copy


class Exchanged:
    """A runner that gives the motion of two joints to each other, as a driver with another joint order does."""

    def __init__(self, runner: Runner, pair: list[int]):
        self._runner, self._pair = runner, pair
        self.spec = runner.spec

    def infer(self, observation, seed: int = 0, noise=None):
        """As the runner's, exchanged."""
        found = self._runner.infer(observation, seed, noise)
        current = positions_by_name(observation.joints, self.spec.joint_names)
        motion = found.chunk.positions - current
        motion[:, self._pair] = motion[:, self._pair[::-1]]
        return replace(found, chunk=replace(found.chunk, positions=current + motion))


class Late:
    """A runner each of whose inferences takes `seconds` longer."""

    def __init__(self, runner: Runner, seconds: float):
        self._runner, self._seconds = runner, seconds
        self.spec = runner.spec

    def infer(self, observation, seed: int = 0, noise=None):
        """As the runner's, later."""
        found = self._runner.infer(observation, seed, noise)
        time.sleep(self._seconds)
        return replace(found, timing=replace(found.timing, total=found.timing.total + self._seconds))


class Remembered:
    """A runner that infers once on each observation: the reference of many comparisons on the same recording."""

    def __init__(self, runner: Runner):
        self._runner, self._known = runner, {}
        self.spec, self.stage_inputs, self.stages = runner.spec, runner.stage_inputs, runner.stages
        self.description = runner.description

    def infer(self, observation, seed: int = 0, noise=None):
        """As the runner's; the timing is that of the first time."""
        key = observation.stamp_ns, seed
        if key not in self._known:
            self._known[key] = self._runner.infer(observation, seed, noise)
        return self._known[key]
