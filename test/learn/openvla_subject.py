"""The random OpenVLAs of test/parity, what they are shown, and how far a student of them is from its teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vla_edge.learn.frames import Frames, from_observations
from vla_edge.learn.match import MatchConfig
from vla_edge.learn.outputs import output_of, with_actions_of
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).resolve().parents[1] / "parity" / "openvla"
INSTRUCTIONS = ("touch the red cube", "push the ball")


def load(name: str):
    """(policy, checkpoint)."""
    checkpoint = load_checkpoint(SAVED / name / "checkpoint")
    return load_policy(checkpoint), checkpoint


def observations(spec, count: int, seed: int = 0) -> list[Observation]:
    """Smooth pictures that differ, so that what is learnt of some holds for others."""
    rng, found = np.random.default_rng(seed), []
    names = tuple(dict.fromkeys((*spec.joint_names, *spec.read_names)))
    for index in range(count):
        images = {}
        for camera in spec.cameras:
            y, x = np.mgrid[: camera.source_height, : camera.source_width] / 10.0
            waves = [np.sin(y * a + x * b + c) for a, b, c in rng.uniform(-1, 1, (3, 3)) * (1, 1, 3)]
            images[camera.name] = np.uint8(127 + 120 * np.stack(waves, -1))
        joints = JointState(0, names, rng.normal(0, 0.3, len(names)))
        stamp = 200_000_000 * index + 5_000_000_000 * (index // 6)
        found.append(Observation(stamp, images, joints, INSTRUCTIONS[index // 6 % 2]))
    return found


def frames_of(policy, checkpoint, count: int, seed: int = 0) -> Frames:
    """With the policy's own actions."""
    frames = from_observations(observations(checkpoint.spec, count, seed), checkpoint.spec, checkpoint.tokenizer_path)
    return with_actions_of(policy, frames, 1)


def apart(teacher, student, frames: Frames) -> tuple[float, float]:
    """Distance of the outputs on the teacher's own actions, and the share of tokens that are alike (nan without)."""
    kind, config = output_of(teacher), MatchConfig()
    question = kind.question(frames.actions, config, None)
    with torch.no_grad():
        theirs, ours = (kind.answer(p, frames, None, question, config).output for p in (teacher, student))
    alike = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item() if kind.tempered else float("nan")
    return kind.distance(ours, theirs, config).item(), alike


def write_demonstrations(directory: Path, joints: Sequence[str], frames: int) -> Path:
    """Episodes of six frames, under each instruction in turn, with pictures as the camera's crop has them and eight random
    points a chunk."""
    rng = np.random.default_rng(0)
    (directory / "recording.json").write_text(json.dumps({"joint_names": list(joints), "dt": 0.05}))
    seen = observations(load_checkpoint(SAVED / "openvla" / "checkpoint").spec, frames, seed=3)
    state = rng.normal(0, 0.3, (frames, len(joints))).astype(np.float32)
    np.savez_compressed(
        directory / "shard-0000.npz", images=np.array([one.images["head"][2:38, 5:57] for one in seen]), state=state,
        action=(state[:, None] + rng.normal(0, 0.3, (frames, 8, len(joints)))).astype(np.float32),
        pointer=np.full((frames, 2), 16, np.float32), goal=np.zeros(frames, np.int32),
        instruction=np.array([INSTRUCTIONS[i // 6 % 2] for i in range(frames)]), episode=np.arange(frames) // 6,
        step=np.arange(frames, dtype=np.int32) % 6,
    )  # fmt: skip
    return directory
