"""Flow policies: noise is led to actions in Euler steps. What depends on flow time alone is computed once, when the
number of steps is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.continuation import Continuation
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
        self._conditions: list[tuple[np.ndarray, np.ndarray]] = []  # that steps are bound to, and as flow time has them
        self._given_rows = 0
        self._lead: Callable[[np.ndarray, float], np.ndarray] | None = None

    @property
    def num_steps(self) -> int:
        return len(self._denoise)

    def set_num_steps(self, num_steps: int) -> None:
        if not 1 <= num_steps <= MOST_STEPS:
            raise RunnerError(f"num_steps is {num_steps}, allowed is 1 to {MOST_STEPS}")
        self._denoise, self._conditions, self._given_rows = [], [], 0
        for step in range(num_steps):
            condition = self._condition(1.0 - step / num_steps)
            self._conditions.append((condition, condition.copy()))
            inputs = self.buffers | {"time_condition": condition}
            self._denoise.append(self.stages["denoise"].bind(inputs, self.buffers))

    def start(self, noise: np.ndarray | None, seed: int, stamp_ns: int) -> None:
        self.actions[...] = noise_for(seed, stamp_ns, self.actions.shape) if noise is None else noise
        self._give_rows(0)
        self._lead = None

    def continue_(self, continuation: Continuation, target: np.ndarray) -> None:
        wanted, weights = np.zeros_like(self.actions), np.zeros_like(self.actions)
        wanted[0, :, : target.shape[1]] = target
        weights[0, :, : target.shape[1]] = continuation.weights[:, None]
        if rows := continuation.prefix:
            self._give_rows(rows)
            self.actions[:, :rows] = wanted[:, :rows]
            stays = (np.arange(self.actions.shape[1]) >= rows).astype(np.float32)[:, None]
            self._lead = lambda velocity, moment: velocity * stays
            return
        begin = max(continuation.begin, 1.0 / self.num_steps) + 1e-9

        def lead(velocity: np.ndarray, moment: float) -> np.ndarray:
            if moment > begin:
                return velocity
            return continuation.lead(self.actions, velocity, moment, wanted, weights)

        self._lead = lead

    def act(self) -> None:
        steps = len(self._denoise)
        size = np.float32(1.0 / steps)
        for index, denoise in enumerate(self._denoise):
            denoise()
            velocity = self._velocity if self._lead is None else self._lead(self._velocity, 1.0 - index / steps)
            # velocity points at the noise, which is where time 1 is
            self.actions -= size * velocity

    def _condition(self, moment: float) -> np.ndarray:
        """What the denoise stage is told of a flow time, of its own: one for all rows, or one for each."""
        condition = self.stages["time"].run({"time": np.array([moment], np.float32)})["time_condition"]
        if self.spec.trained_prefix:
            condition = np.repeat(condition[:, None], self.spec.chunk_size, axis=1)
        return np.array(condition)

    def _give_rows(self, rows: int) -> None:
        """Tells the denoise stage that the first `rows` are actions already."""
        if rows > self.spec.trained_prefix:
            raise RunnerError(
                f"the policy was trained to continue {self.spec.trained_prefix} rows and is given {rows}; choose another "
                "inference policy, such as real_time_chunking, or a faster engine"
            )
        if rows != self._given_rows:
            clean = self._condition(0.0)
            for bound, own in self._conditions:
                bound[...] = own
                bound[:, :rows] = clean[:, :rows]
            self._given_rows = rows

    def inputs(self, seed: int, stamp_ns: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        buffers = {name: buffer.copy() for name, buffer in self.buffers.items()}
        yield from super().inputs(seed, stamp_ns)
        x = noise_for(seed, stamp_ns, self.actions.shape)
        for step in range(self.num_steps):
            moment = {"time": np.array([1.0 - step / self.num_steps], np.float32)}
            inputs = buffers | {"x": x, "time_condition": self._condition(1.0 - step / self.num_steps)}
            if step in (0, self.num_steps - 1):
                yield "time", moment
                yield "denoise", inputs
            if step < self.num_steps - 1:
                (velocity,) = self.stages["denoise"].run(inputs).values()
                x = x - velocity / np.float32(self.num_steps)
