"""What a student is compared with its teacher on, as their policy says (`StagedPolicy.matched`): the velocity of a flow,
the scores of tokens, or actions that come at once. Training itself (`match`) knows none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_edge.learn.frames import Frames
from vla_edge.learn.losses import euler_path, flow_matching_loss, flow_points, velocity
from vla_edge.policy.bins import bin_values, bins_of


class Answer(NamedTuple):
    """What a policy makes of B observations and a question about them.

    Attributes:
        output: (n, T, A, ...) what is compared first of all.
        features: keys and values, (layers, B, ...) each; empty where not asked for.
        looks: of each text layer where its queries look, (B, H, queries, keys); empty where not asked for.
        cache: what the flow was asked of.
    """

    output: Tensor
    features: Sequence[Tensor] = ()
    looks: Sequence[Tensor] = ()
    cache: NamedTuple | None = None


class Output(Protocol):
    """One kind of policies.

    Attributes:
        name: of what is compared. outer: endings of the names of matrices where numbers enter and leave, for `Fit`.
        tempered: whether scores are compared, which can be softened.
    """

    name: ClassVar[str]
    outer: ClassVar[tuple[str, ...]]
    tempered: ClassVar[bool]

    def question(self, actions: Tensor, config, generator: torch.Generator):
        """What is asked about observations whose actions are (B, T, A), normalized: the same of student and teacher."""

    def of_joints(self, question, joints: Sequence[int]):
        """The question to a policy of those joints alone."""

    def answer(self, policy, frames: Frames, gain: Tensor | None, question, config) -> Answer:
        """`gain` as in `Frames.pixels`."""

    def distance(self, ours: Tensor, theirs: Tensor, config) -> Tensor:
        """Of two outputs."""

    def shown(self, policy, answer: Answer, actions: Tensor, config, generator: torch.Generator) -> Tensor:
        """The loss that such policies are trained by without a teacher, on actions (B, T, A)."""

    def own(self, policy, frames: Frames, num_steps: int) -> Tensor:
        """(N, T, A) what the policy itself would do, normalized."""


class Velocity:
    """Of a flow, at points on the ways from actions to noise; keys and values are those that the action expert reads."""

    name, tempered = "velocity", False
    outer = ("patch_embedding", "state_proj", "action_in", "action_out")

    def question(self, actions: Tensor, config, generator) -> tuple[Tensor, Tensor]:
        return flow_points(actions, config.draws, generator)[:2]

    def of_joints(self, question, joints: Sequence[int]) -> tuple[Tensor, Tensor]:
        x, time = question
        return x[..., joints], time

    def answer(self, policy, frames: Frames, gain: Tensor | None, question, config) -> Answer:
        cache, looks = frames.shown_to(policy, gain)
        features = (cache.keys, cache.values) if config.features else ()
        return Answer(velocity(policy, question, cache), features, looks if config.attention else (), cache)

    def distance(self, ours: Tensor, theirs: Tensor, config) -> Tensor:
        return (ours - theirs).square().mean()

    def shown(self, policy, answer: Answer, actions: Tensor, config, generator) -> Tensor:
        return flow_matching_loss(policy, answer.cache, actions, config.draws, generator)

    def own(self, policy, frames: Frames, num_steps: int, batch: int = 64, seed: int = 0) -> Tensor:
        """One sample each."""
        generator, chunks = torch.Generator().manual_seed(seed), []
        shape = (policy.config.chunk_size, policy.config.max_action_dim)
        for begin in range(0, len(frames), batch):
            part = frames.take(np.arange(begin, min(begin + batch, len(frames))))
            noise, cache = torch.randn(len(part), *shape, generator=generator), part.shown_to(policy)[0]
            *_, actions = euler_path(policy, noise, cache, num_steps)
            chunks.append(actions)
        return torch.cat(chunks)


class Scores:
    """Of the 256 tokens that stand for actions, each after the tokens shown before it (teacher forcing): the divergence
    from the teacher's probabilities to the student's, at a temperature (Hinton et al., 2015, arXiv:1503.02531)."""

    name, tempered = "divergence", True
    outer = ("patch_embedding", "prefill.head")

    def question(self, actions: Tensor, config=None, generator=None) -> Tensor:
        return torch.from_numpy(bins_of(actions.numpy()))

    def of_joints(self, question: Tensor, joints: Sequence[int]) -> Tensor:
        return question[..., joints]

    def answer(self, policy, frames: Frames, gain: Tensor | None, question: Tensor, config) -> Answer:
        return _said(policy, frames, gain, question, config)

    def distance(self, ours: Tensor, theirs: Tensor, config) -> Tensor:
        """Mean over the tokens, nats; times the square of the temperature, with which gradients would fade."""
        warmth = config.temperature
        theirs, ours = ((scores / warmth).log_softmax(-1) for scores in (theirs, ours))
        return (theirs.exp() * (theirs - ours)).sum(-1).mean() * warmth**2

    def shown(self, policy, answer: Answer, actions: Tensor, config, generator) -> Tensor:
        return F.cross_entropy(answer.output.flatten(0, -2), self.question(actions).flatten())

    def own(self, policy, frames: Frames, num_steps: int) -> Tensor:
        """By greedy decoding."""
        values = torch.from_numpy(bin_values()).float()
        values[0] = 1.0  # whose word it is, and that of its bin's centre is the next
        chunks = []
        for index in range(len(frames)):
            one = frames.take([index])
            chosen = policy.greedy(one.seen_by(policy), one.tokens, one.mask).argmax(-1)
            chunks.append(values[chosen].reshape(1, policy.config.chunk_size, policy.config.action_dim))
        return torch.cat(chunks)


class Actions:
    """Numbers that come at once: their mean absolute difference, the loss that OpenVLA-OFT (arXiv:2502.19645) and ACT
    (arXiv:2304.13705) are trained by."""

    name, tempered = "actions", False
    outer = ("patch_embedding", "stem.convolution.linear", "state_in", "head.linear_out", "action_out")

    def question(self, actions: Tensor, config, generator) -> None:
        return None

    def of_joints(self, question: None, joints: Sequence[int]) -> None:
        return None

    def answer(self, policy, frames: Frames, gain: Tensor | None, question: None, config) -> Answer:
        return _said(policy, frames, gain, None, config)

    def distance(self, ours: Tensor, theirs: Tensor, config) -> Tensor:
        return (ours - theirs).abs().mean()

    def shown(self, policy, answer: Answer, actions: Tensor, config, generator) -> Tensor:
        return self.distance(answer.output, actions, config)

    def own(self, policy, frames: Frames, num_steps: int) -> Tensor:
        parts = (frames.take([index]) for index in range(len(frames)))
        return torch.cat([policy.chunk(one.seen_by(policy), one.tokens, one.mask, one.state) for one in parts])


OUTPUTS: dict[str, Output] = {"velocity": Velocity(), "scores": Scores(), "actions": Actions()}


def output_of(policy) -> Output:
    """What students of such a policy are compared on."""
    return OUTPUTS[policy.matched]


def with_actions_of(policy, frames: Frames, num_steps: int) -> Frames:
    """The frames with what `policy` would do (behaviour of the teacher)."""
    with torch.no_grad():
        return replace(frames, actions=output_of(policy).own(policy, frames, num_steps))


def _said(policy, frames: Frames, gain: Tensor | None, tokens: Tensor | None, config) -> Answer:
    seen = frames.seen_by(policy, gain), frames.tokens, frames.mask, frames.state
    return Answer(*policy.say(*seen, tokens=tokens, features=bool(config.features), looks=bool(config.attention)))
