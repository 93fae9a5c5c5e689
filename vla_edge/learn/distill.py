"""A teacher and demonstrations -> a student of a given size, as a checkpoint of its own.

The student begins as the teacher with the feed-forward channels taken out that are missed least, and is trained to give
the teacher's output, keys and values and to look where it looks (`match`). It may be for a part of the task: for some
of the joints, so that its state and actions shrink, and for some of the instructions.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from vla_edge.policy.spec import PolicySpec
from vla_edge.types import Observation, VlaEdgeError

SEEN, JUDGED = 96, 32
"""Observations that tell which channels are missed, and that the student is compared with its teacher on."""
_SAVE_EVERY = 50


class DistillError(VlaEdgeError):
    """A student that cannot be made as asked."""


@dataclass(frozen=True)
class Student:
    """What was made.

    Attributes:
        directory: its checkpoint.
        parameters, teacher_parameters: numbers that are trained, of both.
        joints: that it moves. frames: it was trained on.
        action_error_rel: mean absolute difference to the teacher's chunks, from the same noise, over the standard
            deviation of the motion of its joints; on `compared` observations of the demonstrations.
    """

    directory: Path
    parameters: int
    teacher_parameters: int
    joints: tuple[str, ...]
    frames: int
    action_error_rel: float
    compared: int


def distill(
    teacher: str | Path,
    output: str | Path,
    size: float,
    demonstrations: Sequence[str | Path],
    joints: Sequence[str] = (),
    instructions: Sequence[str] = (),
    steps: int = 2500,
    batch: int = 32,
    rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> Student:
    """Make a student, or go on where making it was interrupted.

    Args:
        teacher: checkpoint directory. output: of the student; must not exist.
        size: share of the teacher's parameters that the student may have, above 0, to 1.
        demonstrations: directories of `make demonstrations`.
        joints: names or patterns of those it is to move, all of the teacher's when empty.
        instructions: patterns of those it is to follow, all when empty.
        steps, batch, rate, seed: of training.

    Raises:
        DistillError: what cannot be had, before any work. CheckpointError, DemonstrationError, TrainingError.
    """
    import torch

    from vla_edge.engine.build import torch_threads
    from vla_edge.learn.frames import from_demonstrations
    from vla_edge.learn.match import Match, MatchConfig
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy
    from vla_edge.policy.families import FAMILIES

    tell = progress or (lambda fraction, what: None)
    output = Path(output).expanduser().resolve()
    if output.exists():
        raise DistillError(f"{output} exists already; choose another output, or remove it")
    if not 0 < size <= 1:
        raise DistillError(f"size is {size:g}, allowed is above 0, to 1: a share of the teacher's parameters")
    if min(steps, batch) < 1 or not 0 < rate <= 1:
        raise DistillError(f"training is {steps} steps of {batch} frames at a rate of {rate:g}; all must be above 0")
    if not demonstrations:
        raise DistillError("there are no demonstrations to train on; give directories of them")
    tell(0.0, "reading teacher and demonstrations")
    checkpoint = load_checkpoint(teacher)
    making = checkpoint.family.student
    if making is None:
        able = ", ".join(name for name, family in FAMILIES.items() if family.student)
        raise DistillError(f"the teacher is {checkpoint.family.title}; students are made of the families {able}")
    columns = joint_columns(checkpoint.spec, joints)
    spec = checkpoint.spec
    if joints:
        spec = spec.of_joints([spec.joint_names[column] for column in columns])
    policy = load_policy(checkpoint)
    if policy.matched == "scores":
        policy.one_by_one_()  # a draft is of the policy that it was trained with
    student = copy.deepcopy(policy)
    if joints:
        try:
            making.keep_joints(student, columns)
        except ValueError as error:
            raise DistillError(f"the teacher cannot have a student of some of its joints: {error}") from error
    share = channel_share(student, size, parameters(policy))
    config = MatchConfig(steps=steps, batch=batch, rate=rate, seed=seed, warmup=min(20, steps), attention=1.0)
    frames = from_demonstrations(demonstrations, checkpoint.spec, checkpoint.tokenizer_path, instructions)
    seen = _observations(demonstrations, checkpoint.spec, instructions)
    work = output.with_name(f".{output.name}.training")
    asked = [checkpoint.fingerprint, share, columns, list(instructions), asdict(config), len(frames)]
    run = work / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    judges = seen[:: max(1, len(seen) // JUDGED)][:JUDGED]
    torch.manual_seed(seed)
    with torch_threads(parameters(policy)):
        if share:
            _shrink(student, share, replace(checkpoint, spec=spec), seen, tell)
        fit = Match(config, student, policy, frames, run, columns if joints else None)
        fit.train(_SAVE_EVERY, lambda step, losses: tell(0.1 + 0.8 * step / steps, _told(losses)))
        made = fit.average.eval()
        tell(0.9, "comparing with the teacher")
        error = _error(made, policy, checkpoint, spec, columns, judges)
    making.write(output, made, spec, checkpoint)
    shutil.rmtree(work, ignore_errors=True)
    tell(1.0, "writing the checkpoint")
    return Student(output, parameters(made), parameters(policy), spec.joint_names, len(frames), error, len(judges))


def joint_columns(spec: PolicySpec, wanted: Sequence[str]) -> list[int]:
    """Columns of the teacher's joints that names or patterns mean, in its order; all when there are none.

    Raises:
        DistillError: one means no joint that the teacher moves.
    """
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in spec.joint_names):
            nearest = difflib.get_close_matches(pattern, spec.joint_names, n=1, cutoff=0.0)[0]
            raise DistillError(
                f"the teacher moves no joint {pattern!r}, so a student cannot learn it; did you mean {nearest!r}? It "
                f"moves {', '.join(spec.joint_names)}"
            )
    return [
        column for column, name in enumerate(spec.joint_names)
        if not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)
    ]  # fmt: skip


def parameters(policy) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in policy.parameters())


def channel_share(policy, size: float, teacher: int) -> float:
    """Share of every feed-forward's channels that has to go for `policy` to have `size` of `teacher` parameters.

    Raises:
        DistillError: even with one channel each it would have more.
    """
    from vla_edge.policy.blocks import units_in

    blocks = [units for units in units_in(policy) if units.kind == "channels"]
    now, allowed = parameters(policy), size * teacher
    shares = sorted({k / units.count for units in blocks for k in range(units.count)})
    for share in shares:
        left = now - sum(min(round(share * u.count), u.count - 1) * _weights_of_one(u) for u in blocks)
        if left <= allowed:
            return share
    raise DistillError(
        f"a student of {100 * size:g} % of the teacher is smaller than it can be made by its feed-forwards' channels "
        f"alone, which leave {100 * left / teacher:.1f} %; ask for more, or begin with another architecture"
    )


def _weights_of_one(units) -> int:
    made = sum(width * (layer.in_features + (layer.bias is not None)) for layer, width in units.makers)
    return made + sum(width * layer.out_features for layer, width in units.readers)


def _shrink(student, share: float, checkpoint, observations: Sequence[Observation], tell) -> None:
    from vla_edge.compress.pipeline import shrink_units
    from vla_edge.compress.steps import Shrink
    from vla_edge.engine.runner import Runner

    runner = Runner.from_policy(student, checkpoint)
    step = Shrink(("*",), channels=share)
    shrink_units(step, student, runner, observations, lambda f, what: tell(0.02 + 0.08 * f, what), "distill")


def _observations(directories: Sequence, spec: PolicySpec, patterns: Sequence[str]) -> list[Observation]:
    """A sample of what was recorded under those instructions, spread evenly over it."""
    from vla_edge.compress.calibrate import Sample
    from vla_edge.evaluate.demonstrations import DemonstrationRecording

    sample = Sample(SEEN)
    for directory in directories:
        with DemonstrationRecording(directory) as recording:
            for moment in recording.moments(spec):
                if not patterns or any(fnmatchcase(moment.instruction, pattern) for pattern in patterns):
                    sample.add(moment)
    return [moment.read() for moment in sample.items()]


def _error(student, teacher, checkpoint, spec: PolicySpec, columns, observations: Sequence[Observation]) -> float:
    from vla_edge.engine.runner import Runner
    from vla_edge.evaluate.metrics import MotionScale
    from vla_edge.policy.noise import noise_for
    from vla_edge.policy.preprocess import positions_by_name

    theirs, ours = Runner.from_policy(teacher, checkpoint), Runner.from_policy(student, replace(checkpoint, spec=spec))
    scale, errors = MotionScale(), []
    width = ours.noise_shape[-1]
    for observation in observations:
        noise = noise_for(0, observation.stamp_ns, theirs.noise_shape)
        own = noise if width == noise.shape[-1] else noise[..., columns]
        wanted = theirs.infer(observation, noise=noise).chunk.positions[:, columns]
        errors.append(np.abs(ours.infer(observation, noise=own).chunk.positions - wanted).mean())
        scale.add(wanted, positions_by_name(observation.joints, spec.joint_names))
    return float(np.mean(errors) / scale.std())


def _told(losses) -> str:
    return f"training ({', '.join(f'{name} {value:.4f}' for name, value in losses.items() if name != 'norm')})"
