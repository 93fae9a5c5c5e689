"""The noise levels of a diffusion policy and the way from one to the next: numbers alone, as diffusers has them.

DDPM (Ho et al., 2020, arXiv:2006.11239) with the smaller of its two variances, DDIM (Song et al., 2021,
arXiv:2010.02502) without noise of its own; steps are spread over the levels as diffusers' "leading" spacing does. Levels
are held in float32 as there, so that the same noise gives the same actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_edge.policy.spec import DiffusionSpec

MOST_BETA = 0.999


@dataclass(frozen=True)
class DenoisingStep:
    """From one noise level to the next lower one.

    Attributes:
        level: as the network is told it.
        signal, noise: what x is made of here: signal * actions + noise * epsilon.
        tells_noise: whether the network's prediction is epsilon; the actions otherwise.
        clip: largest magnitude of the actions that x is led to, None for no limit.
        of_actions, of_x, of_epsilon: what the next x is made of.
        added: of new noise.
    """

    level: int
    signal: np.float32
    noise: np.float32
    tells_noise: bool
    clip: float | None
    of_actions: np.float32
    of_x: np.float32
    of_epsilon: np.float32
    added: np.float32

    def __call__(self, x, prediction, new_noise=None):
        """The next x; arrays of numpy or torch, all of one shape. `new_noise` where any is added."""
        if self.tells_noise:
            epsilon, actions = prediction, (x - self.noise * prediction) / self.signal
        else:
            epsilon, actions = (x - self.signal * prediction) / self.noise, prediction
        if self.clip is not None:
            actions = actions.clip(-self.clip, self.clip)
        reached = self.of_actions * actions
        if self.of_x:
            reached = reached + self.of_x * x
        if self.of_epsilon:
            reached = reached + self.of_epsilon * epsilon
        return reached + self.added * new_noise if self.added else reached


def signal_levels(spec: DiffusionSpec) -> np.ndarray:
    """(train_steps,) float32: the share of the actions' variance that is left at each level, most first.

    Raises:
        ValueError: there is no such schedule.
    """
    count = spec.train_steps
    if spec.betas == "linear":
        betas = np.linspace(spec.beta_start, spec.beta_end, count, dtype=np.float32)
    elif spec.betas == "scaled_linear":
        betas = np.linspace(spec.beta_start**0.5, spec.beta_end**0.5, count, dtype=np.float32) ** 2
    elif spec.betas == "squaredcos_cap_v2":  # Nichol & Dhariwal, 2021, arXiv:2102.09672
        left = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - left[1:] / left[:-1], MOST_BETA).astype(np.float32)
    else:
        raise ValueError(f"beta_schedule is {spec.betas!r}; known are linear, scaled_linear and squaredcos_cap_v2")
    return np.cumprod(1 - betas, dtype=np.float32)


def denoising_steps(spec: DiffusionSpec, num_steps: int) -> tuple[DenoisingStep, ...]:
    """From noise to actions in `num_steps` steps, at most one for each level."""
    levels, ratio, one = signal_levels(spec), spec.train_steps // num_steps, np.float32(1)
    steps = []
    for level in (np.arange(num_steps) * ratio)[::-1].tolist():
        here, there = levels[level], levels[level - ratio] if level >= ratio else one
        signal, noise = np.sqrt(here), np.sqrt(one - here)
        if spec.sampler == "DDIM":
            made = (np.sqrt(there), np.float32(0), np.sqrt(one - there), np.float32(0))
        else:
            kept = here / there
            of_actions = np.sqrt(there) * (one - kept) / (one - here)
            of_x = np.sqrt(kept) * (one - there) / (one - here)
            variance = (one - there) / (one - here) * (one - kept)
            added = np.sqrt(np.maximum(variance, np.float32(1e-20))) if level else np.float32(0)
            made = (of_actions, of_x, np.float32(0), added)
        steps.append(DenoisingStep(level, signal, noise, spec.prediction == "epsilon", spec.clip, *made))
    return tuple(steps)
