"""A training run that can be killed at any moment: what every kind of training here shares.

`OUT/state.pt` is what a run goes on from, `OUT/log.jsonl` its losses. Every step draws its data from (seed, step), so
an interrupted run goes on with what it would have seen.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vla_edge.learn.muon import Muon
from vla_edge.types import VlaEdgeError


class TrainingError(VlaEdgeError):
    """Training cannot start or go on."""


@dataclass(frozen=True)
class FitConfig:
    """What every run has; it cannot change within one.

    Attributes:
        steps: optimizer steps. batch: frames each.
        rate: peak learning rate, after `warmup` steps and before a cosine down to zero. decay: of matrices.
        clip: norm that gradients are cut to.
        average: decay of the moving average of the weights, which is the result.
    """

    steps: int = 2350
    batch: int = 64
    rate: float = 2e-3
    warmup: int = 150
    decay: float = 0.02
    clip: float = 1.0
    average: float = 0.998
    seed: int = 0


class Fit:
    """One run: a module, its average and optimizers.

    Args:
        config: of the run. module: what is trained, in place. out: where the run lives.
        outer: endings of the names of matrices that AdamW trains; Muon trains the others.

    Raises:
        TrainingError: `out` holds a run of another configuration, or a damaged one.
    """

    def __init__(self, config: FitConfig, module: nn.Module, out: Path, outer: Sequence[str] = ()):
        self.config, self.module, self.out, self.step = config, module, out, 0
        out.mkdir(parents=True, exist_ok=True)
        self.average = copy.deepcopy(module).requires_grad_(False)
        self.optimizers = optimizers(module, config, outer)
        self._resume()

    def losses(self, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        """Name -> loss of one step; their sum is made small."""
        raise NotImplementedError

    def train(self, save_every: int, progress: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Runs to the last step, saving as it goes.

        Args:
            save_every: steps.
            progress: called with the step that was made and its losses.
        """
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as log:
            while self.step < self.config.steps:
                begin = time.perf_counter()
                losses = self.update()
                if progress is not None:
                    progress(self.step, losses)
                if self.step % 10 == 0:
                    log.write(json.dumps({"step": self.step, **losses, "s": time.perf_counter() - begin}) + "\n")
                    log.flush()
                if self.step % save_every == 0 or self.step == self.config.steps:
                    self.save()

    def update(self) -> dict[str, float]:
        """One optimizer step; returns its losses and the norm of the gradient."""
        config = self.config
        rng = np.random.default_rng([config.seed, self.step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.rate * schedule(self.step, config)
            optimizer.zero_grad(set_to_none=True)
        losses = self.losses(rng, generator)
        sum(losses.values()).backward()
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient of step {self.step} is not finite; lower the learning rate")
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        # the average follows closely at first, when the weights still move a lot
        keep = min(config.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.module.parameters()):
                mean.lerp_(value, 1 - keep)
        return {**{name: loss.item() for name, loss in losses.items()}, "norm": norm.item()}

    def save(self) -> None:
        """Writes what the run goes on from."""
        temporary = self.out / "state.pt.part"
        torch.save(
            {
                "config": asdict(self.config),
                "step": self.step,
                "policy": self.module.state_dict(),
                "average": self.average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            temporary,
        )
        os.replace(temporary, self.out / "state.pt")

    def _resume(self) -> None:
        file = self.out / "state.pt"
        if not file.exists():
            return
        try:
            saved = torch.load(file, weights_only=True)
            different = {
                name: (value, saved["config"].get(name))
                for name, value in asdict(self.config).items()
                if saved["config"].get(name) != value
            }
            if different:
                raise TrainingError(f"{self.out} holds a run with other settings ({different}); choose another --out")
            self.module.load_state_dict(saved["policy"])
            self.average.load_state_dict(saved["average"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step = saved["step"]
        except TrainingError:
            raise
        except Exception as error:
            raise TrainingError(f"{file} cannot be read ({error}); delete it to begin again") from error


def schedule(step: int, config: FitConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero at the last step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(config.steps - config.warmup, 1)))


def optimizers(module: nn.Module, config: FitConfig, outer: Sequence[str] = ()) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of linear layers, AdamW for those whose names end in `outer` and for everything else."""
    inside = {
        f"{name}.weight"
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not name.endswith(tuple(outer))
    }
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if name in inside]
    others = [parameter for name, parameter in trained if name not in inside]
    return (
        *([Muon(matrices, config.rate, weight_decay=config.decay)] if matrices else []),
        *([torch.optim.AdamW(others, config.rate, betas=(0.9, 0.98), weight_decay=0.0)] if others else []),
    )
