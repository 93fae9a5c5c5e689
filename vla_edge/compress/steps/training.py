"""Steps that train the policy, or make a smaller one of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vla_edge.compress.steps.checks import number, one_of, whole


@dataclass(frozen=True)
class Shrink:
    """Take channels of feed-forwards, heads of attentions and whole layers out of the policy, those missed least.

    Attributes:
        targets: which parts; a block is made smaller, or goes, where they cover all of its layers.
        channels, heads: share of each block's that goes, 0 to below 1; at least one always stays.
        blocks: how many layers go as a whole, or which share of them; first, before channels and heads.
        by: what tells which layers are missed least, see `prune.blocks`: "action" for the error of the chunk without
            them, "cosine" for how little they change what goes through them.
    """

    key: ClassVar[str] = "shrink"
    needs_statistics: ClassVar[bool] = True
    changes_policy: ClassVar[bool] = True
    targets: tuple[str, ...]
    channels: float = 0.0
    heads: float = 0.0
    blocks: int | float = 0
    by: str = "action"

    def check(self) -> None:
        if isinstance(self.blocks, float):
            number("blocks", self.blocks, 0, 1 - 1e-12, "a whole number, or a share above 0, below 1")
        else:
            whole("blocks", self.blocks, ", 0, or a share above 0, below 1", least=0)
        one_of("by", self.by, ("action", "cosine"))
        for name in ("channels", "heads"):
            number(name, getattr(self, name), -1e-12, 1, "0 to below 1")
            if getattr(self, name) == 1:
                raise ValueError(f"{name} is 1, allowed is 0 to below 1")
        if self.channels == self.heads == self.blocks == 0:
            raise ValueError("channels, heads and blocks are all 0; give one of them")


@dataclass(frozen=True)
class Finetune:
    """Train the policy to do what it did before the steps so far, under what they decided: weights that were pruned
    stay zero, weights that are quantized are trained through their rounding.

    Attributes:
        steps: of the optimizer. batch: frames each. rate: at its peak. seed: of the order of frames, and of noise.
        features, attention: weight of the teacher's keys and values, and of where its text layers look. shown: of the
            actions that demonstrations show, beside those of the teacher.
        temperature: that scores of tokens are divided by, for policies that write their actions as tokens; 1 when None.
        demonstrations: directories to train on; what the build is given, or else the recording it calibrates on.
    """

    key: ClassVar[str] = "finetune"
    needs_statistics: ClassVar[bool] = True
    changes_policy: ClassVar[bool] = True
    steps: int = 300
    batch: int = 32
    rate: float = 3e-4
    features: float = 0.1
    attention: float = 0.0
    shown: float = 0.0
    temperature: float | None = None
    seed: int = 0
    demonstrations: tuple[str, ...] = ()

    def check(self) -> None:
        _training(self)
        for name in ("features", "attention", "shown"):
            number(name, getattr(self, name), -1e-12, 1e6, "0 or above")
        if self.temperature is not None:
            number("temperature", self.temperature, 0, 100, "above 0, to 100")


@dataclass(frozen=True)
class FewSteps:
    """Train the action expert to reach in few flow steps where the policy's own many lead.

    Attributes:
        num_steps: flow steps afterwards; divides those of the checkpoint.
        steps, batch, rate, seed, demonstrations: as of `finetune`.
    """

    key: ClassVar[str] = "few_steps"
    needs_statistics: ClassVar[bool] = True
    changes_policy: ClassVar[bool] = True
    num_steps: int = 2
    steps: int = 400
    batch: int = 64
    rate: float = 3e-4
    seed: int = 0
    demonstrations: tuple[str, ...] = ()

    def check(self) -> None:
        _training(self)
        whole("num_steps", self.num_steps)


def _training(step) -> None:
    for name in ("steps", "batch"):
        whole(name, getattr(step, name))
    number("rate", step.rate, 0, 1, "above 0, to 1")
    whole("seed", step.seed, ", or 0", least=0)
