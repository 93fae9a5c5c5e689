"""A policy trained to do what another does: recovery after pruning, quantization-aware training, distillation, and
fewer flow steps.

The student sees what the teacher sees and is to give the teacher's output (`outputs`) and the teacher's keys and values
(Hinton et al., 2015, arXiv:1503.02531; features as in FitNets, Romero et al., 2014, arXiv:1412.6550). No labels are
needed beyond the observations: where nobody showed actions, the teacher's own take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vla_edge.learn.fit import Fit, FitConfig
from vla_edge.learn.frames import Frames
from vla_edge.learn.losses import euler_path, velocity
from vla_edge.learn.outputs import output_of


@dataclass(frozen=True)
class StudentConfig(FitConfig):
    """Defaults of what begins near its goal: a lower rate, a shorter warm-up and memory."""

    rate: float = 3e-4
    warmup: int = 20
    average: float = 0.99


@dataclass(frozen=True)
class MatchConfig(StudentConfig):
    """How a student follows its teacher.

    Attributes:
        draws: (noise, time) pairs per frame, of a flow.
        temperature: that scores of tokens are divided by. At 1 the least divergence is that of the teacher's very
            choices; above, what it hardly ever chooses counts more.
        features: weight of the keys and values, where student and teacher have as many; attention: of where the text
            layers look, likewise. shown: weight of the policy's own training loss, on the actions that were shown.
        brightness: relative. state_noise: standard deviations of the state.
    """

    steps: int = 300
    batch: int = 32
    draws: int = 2
    temperature: float = 1.0
    features: float = 0.1
    attention: float = 0.0
    shown: float = 0.0
    brightness: float = 0.05
    state_noise: float = 0.02


class Match(Fit):
    """Every part of a student, against its teacher on the same input.

    Args:
        config: of the run. student: trained in place. teacher: any policy of the same stages and actions.
        frames: with actions. out: where the run lives.
        joints: columns of the teacher's state and actions that the student has; all when None. What the teacher does
            with the others is then averaged over, which leaves the flow of those that are had (the velocity of a
            marginal is the mean velocity; Lipman et al., 2022, arXiv:2210.02747), and the probabilities of their tokens
            (a mixture has the least mean divergence from its parts).
    """

    def __init__(
        self,
        config: MatchConfig,
        student: nn.Module,
        teacher: nn.Module,
        frames: Frames,
        out: Path,
        joints: Sequence[int] | None = None,
    ):
        self.teacher, self.frames, self.output = teacher.eval(), frames, output_of(student)
        self.joints = None if joints is None else list(joints)
        student.requires_grad_(True)
        super().__init__(config, student, out, self.output.outer)

    def losses(self, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        config, kind = self.config, self.output
        batch, gain = _draw(self.frames, config, rng)
        question = kind.question(batch.actions, config, generator)
        with torch.no_grad():  # first, before memory holds the student's activations
            wanted = kind.answer(self.teacher, batch, gain, question, config)
        if self.joints is not None:
            batch, question = batch.of_joints(self.joints), kind.of_joints(question, self.joints)
            wanted = wanted._replace(output=wanted.output[:, :, self.joints])
        given = kind.answer(self.module, batch, gain, question, config)
        losses = {kind.name: kind.distance(given.output, wanted.output, config)}
        pairs = list(zip(given.features, wanted.features))
        if pairs and all(ours.shape == theirs.shape for ours, theirs in pairs):
            losses["features"] = config.features * sum(relative(*pair) for pair in pairs)
        # layers that see fewer tokens than the teacher's have nothing to follow
        pairs = [pair for pair in zip(given.looks, wanted.looks) if pair[0].shape[2:] == pair[1].shape[2:]]
        if pairs and len(given.looks) == len(wanted.looks):
            losses["attention"] = config.attention * sum(_divergence(*pair) for pair in pairs) / len(pairs)
        if config.shown:
            losses["shown"] = config.shown * kind.shown(self.module, given, batch.actions, config, generator)
        return losses


@dataclass(frozen=True)
class FewStepsConfig(StudentConfig):
    """How the number of flow steps is reduced.

    Attributes:
        num_steps: of the student. teacher_steps: of the teacher, a multiple of it.
    """

    steps: int = 400
    batch: int = 64
    num_steps: int = 2
    teacher_steps: int = 10


class FewSteps(Fit):
    """The action expert learns to take a teacher's many flow steps in few.

    From every point of the coarse grid the student is to reach, in one step, where the teacher's fine steps lead from
    the same noise (progressive distillation, Salimans & Ho, 2022, arXiv:2202.00512, with all halvings at once). Beyond
    the first step it starts from its own previous point, so that it learns to mend its own errors and not only the
    teacher's path; its input is what it will meet on the robot.

    Args:
        config: of the run. student: whose `denoise` and `time` are trained in place. teacher: with the same prefix.
    """

    def __init__(self, config: FewStepsConfig, student: nn.Module, teacher: nn.Module, frames: Frames, out: Path):
        self.student, self.teacher, self.frames = student, teacher.eval(), frames
        student.requires_grad_(False)
        trained = nn.ModuleDict({"denoise": student.denoise, "time": student.time})
        super().__init__(config, trained.requires_grad_(True), out, ("action_in", "action_out"))

    def losses(self, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        config = self.config
        batch = self.frames.take(rng.integers(len(self.frames), size=config.batch))
        start = torch.randn(batch.actions.shape, generator=generator)
        coarse, fine = config.num_steps, config.teacher_steps
        with torch.no_grad():
            cache = batch.shown_to(self.student)[0]
            every = fine // coarse
            path = list(euler_path(self.teacher, start, cache, fine))[every - 1 :: every]
        losses, x = {}, start
        for step, goal in enumerate(path):
            given = velocity(self.student, (x, torch.full((len(x),), 1 - step / coarse)), cache)
            wanted = (x - goal) * coarse
            losses[f"step{step + 1}"] = (given - wanted).square().mean() / coarse**2
            x = (x - given / coarse).detach()
        return losses


def relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean square difference over mean square, layer by layer (the first dimension)."""
    dims = tuple(range(1, ours.ndim))
    return ((ours - theirs).square().mean(dims) / theirs.square().mean(dims).clamp_min(1e-12)).mean()


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of (B, heads, queries, keys) to where the teacher looks, nats: of each head where
    there are as many, of what a layer looks at on the whole otherwise."""
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = ours.mean(1), theirs.mean(1)
    return (theirs * ((theirs + 1e-6) / (ours + 1e-6)).log()).sum(-1).mean()


def _draw(frames: Frames, config: MatchConfig, rng: np.random.Generator) -> tuple[Frames, Tensor]:
    batch = frames.take(rng.integers(len(frames), size=config.batch))
    gain = 1 + config.brightness * rng.uniform(-1, 1, config.batch).astype(np.float32)
    noise = torch.from_numpy(rng.standard_normal(batch.state.shape).astype(np.float32))
    state = batch.state + config.state_noise * noise
    return Frames(batch.images, batch.tokens, batch.mask, state, batch.actions), torch.from_numpy(gain)
