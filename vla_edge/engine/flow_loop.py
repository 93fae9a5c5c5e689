"""Flow policies: noise is led to actions in Euler steps. What depends on flow time alone is computed once, when the
number of steps is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.loop import Loop, RunnerError
from vla_edge.policy.noise import noise_for
from vla_edge.policy.spec import PolicySpec

MOST_STEPS = 100


class FlowLoop(Loop):
    """From t = 1, noise, to t = 0."""

    NAMES, READS = ("vision", "prefix", "time", "denoise"), "prefix"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self.actions, self._velocity = self.buffers["x"], self.buffers["velocity"]
        self._denoise: list = []

    @property
    def num_steps(self) -> int:
        return len(self._denoise)

    def set_num_steps(self, num_steps: int) -> None:
        if not 1 <= num_steps <= MOST_STEPS:
            raise RunnerError(f"num_steps is {num_steps}, allowed is 1 to {MOST_STEPS}")
        self._denoise = []
        for step in range(num_steps):
            moment = np.array([1.0 - step / num_steps], np.float32)
            condition = self.stages["time"].run({"time": moment})["time_condition"]
            inputs = self.buffers | {"time_condition": np.ascontiguousarray(condition)}
            self._denoise.append(self.stages["denoise"].bind(inputs, self.buffers))

    def start(self, noise: np.ndarray | None, seed: int, stamp_ns: int) -> None:
        self.actions[...] = noise_for(seed, stamp_ns, self.actions.shape) if noise is None else noise

    def act(self) -> None:
        step = np.float32(1.0 / len(self._denoise))
        for denoise in self._denoise:
            denoise()
            # velocity points at the noise, which is where time 1 is
            self.actions -= step * self._velocity

    def inputs(self, seed: int, stamp_ns: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        buffers = {name: buffer.copy() for name, buffer in self.buffers.items()}
        yield from super().inputs(seed, stamp_ns)
        x = noise_for(seed, stamp_ns, self.actions.shape)
        for step in range(self.num_steps):
            moment = {"time": np.array([1.0 - step / self.num_steps], np.float32)}
            inputs = buffers | {"x": x} | self.stages["time"].run(moment)
            if step in (0, self.num_steps - 1):
                yield "time", moment
                yield "denoise", inputs
            if step < self.num_steps - 1:
                (velocity,) = self.stages["denoise"].run(inputs).values()
                x = x - velocity / np.float32(self.num_steps)
