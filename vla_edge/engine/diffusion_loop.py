"""Diffusion policies: noise is taken out of the actions level by level, and some samplers put less of it back. What
depends on the level alone is computed once, when the number of steps is chosen.

More rows are denoised than the chunk has: it begins at the newest observation, and they at the oldest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.loop import Loop, RunnerError
from vla_edge.policy.noise import noise_for
from vla_edge.policy.schedule import DenoisingStep, denoising_steps
from vla_edge.policy.spec import PolicySpec


class DiffusionLoop(Loop):
    """From pure noise to actions, in the steps of the spec's schedule."""

    NAMES, READS = ("vision", "prefix", "time", "denoise"), "prefix"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self._x, self._prediction = self.buffers["x"], self.buffers["prediction"]
        first = spec.diffusion.first
        self.actions = self._x[:, first : first + spec.chunk_size]
        self._steps: tuple[DenoisingStep, ...] = ()
        self._denoise: list[Callable[[], None]] = []
        self._new_noise = np.zeros((0, *self._x.shape[1:]), np.float32)

    @classmethod
    def runs(cls, spec: PolicySpec) -> bool:
        return spec.diffusion is not None

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(1 + N, horizon, A): what x begins as, and what each of the N steps that add noise adds."""
        return (1 + sum(step.added > 0 for step in self._steps), *self._x.shape[1:])

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    def set_num_steps(self, num_steps: int, evaluated: Sequence[int] = ()) -> None:
        most = self.spec.diffusion.train_steps
        if not 1 <= num_steps <= most:
            raise RunnerError(f"num_steps is {num_steps}, but the policy knows {most} noise levels: allowed is 1 to {most}")
        if evaluated:
            raise RunnerError("every step of a diffusion policy asks the network; choose a smaller number of steps")
        self._steps = denoising_steps(self.spec.diffusion, num_steps)
        self._denoise = [
            self.stages["denoise"].bind(self.buffers | {"time_condition": self._condition(step)}, self.buffers)
            for step in self._steps
        ]
        self._new_noise = np.zeros(self.noise_shape, np.float32)[1:]

    def start(self, noise: np.ndarray | None, seed: int, stamp_ns: int) -> None:
        noise = noise_for(seed, stamp_ns, self.noise_shape) if noise is None else noise
        self._x[...], self._new_noise = noise[:1], noise[1:]

    def acting(self) -> Iterator[tuple[str, Callable[[], None]]]:
        added = iter(self._new_noise)
        for step, denoise in zip(self._steps, self._denoise):
            yield "denoise", denoise
            self._x[...] = step(self._x, self._prediction, next(added) if step.added else None)

    def _condition(self, step: DenoisingStep) -> np.ndarray:
        """What the denoise stage is told of a level, of its own."""
        return np.array(self.stages["time"].run(self._level(step))["time_condition"])

    def _level(self, step: DenoisingStep) -> dict[str, np.ndarray]:
        return {"time": np.array([step.level], np.float32)}

    def inputs(self, seed: int, stamp_ns: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        buffers = {name: buffer.copy() for name, buffer in self.buffers.items()}
        yield from super().inputs(seed, stamp_ns)
        noise = noise_for(seed, stamp_ns, self.noise_shape)
        x, added = noise[:1], iter(noise[1:])
        for step in self._steps:
            inputs = buffers | {"x": x, "time_condition": self._condition(step)}
            if step in (self._steps[0], self._steps[-1]):
                yield "time", self._level(step)
                yield "denoise", inputs
            (prediction,) = self.stages["denoise"].run(inputs).values()
            x = step(x, prediction, next(added) if step.added else None)
