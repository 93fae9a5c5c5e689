"""Flow policies: noise is led to actions in Euler steps. What depends on flow time alone is computed once, when the
number of steps is chosen.

Not every step has to ask the network: the velocity changes slowly, and in between it goes on changing as it did between
the last two that were asked (linear extrapolation; caches of velocities between steps, as of TeaCache, arXiv:2411.19108,
hold the last one). Which steps ask is for `compress.flow_steps` to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.continuation import Continuation
from vla_edge.engine.loop import Loop, RunnerError
from vla_edge.policy.noise import noise_for
from vla_edge.policy.spec import PolicySpec

MOST_STEPS = 100


def flow_times(num_steps: int) -> tuple[np.float32, ...]:
    """At which each of the steps begins."""
    return tuple(np.float32(1.0 - step / num_steps) for step in range(num_steps))


def extrapolation(gap: int, steps: int) -> np.float32:
    """How much of the change between the last two velocities that were asked for, `gap` steps apart, is on average still
    to come in the `steps` steps until the next."""
    return np.float32((steps - 1) / (2 * gap))


def mean_velocity(asked: np.ndarray, previous: np.ndarray, ahead: np.float32) -> np.ndarray:
    """Of a step that begins with the velocity `asked`; `ahead` as of `extrapolation`, 0 where there is no `previous`."""
    return asked + ahead * (asked - previous) if ahead else asked


@dataclass(frozen=True)
class _Step:
    """From one velocity that the network is asked for to the next.

    Attributes:
        denoise: asks it. moment: flow time. size: flow time until the next. ahead: see `extrapolation`.
    """

    denoise: Callable[[], None]
    moment: float
    size: np.float32
    ahead: np.float32

    def velocity(self, asked: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Mean velocity of the step; `previous` becomes `asked`."""
        found = mean_velocity(asked, previous, self.ahead)
        previous[...] = asked
        return found


class FlowLoop(Loop):
    """From t = 1, noise, to t = 0."""

    NAMES, READS = ("vision", "prefix", "time", "denoise"), "prefix"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self._x, self._velocity = self.buffers["x"], self.buffers["velocity"]
        self.actions = self._x[:, : spec.chunk_size]
        self._steps: list[_Step] = []
        self._previous = np.zeros_like(self._velocity)
        self._conditions: list[tuple[np.ndarray, np.ndarray]] = []  # that steps are bound to, and as flow time has them
        self._given_rows = 0
        self._lead: Callable[[np.ndarray, float], np.ndarray] | None = None

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self._x.shape

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    def set_num_steps(self, num_steps: int, evaluated: Sequence[int] = ()) -> None:
        if not 1 <= num_steps <= MOST_STEPS:
            raise RunnerError(f"num_steps is {num_steps}, allowed is 1 to {MOST_STEPS}")
        asked = tuple(evaluated) or tuple(range(num_steps))
        if asked[0] != 0 or asked[-1] >= num_steps or any(a >= b for a, b in zip(asked, asked[1:])):
            raise RunnerError(f"of {num_steps} flow steps {asked} cannot be those that ask the network; the first has to")
        self._steps, self._conditions, self._given_rows = [], [], 0
        for before, step, after in zip((None, *asked), asked, (*asked[1:], num_steps)):
            moment = 1.0 - step / num_steps
            condition = self._condition(moment)
            self._conditions.append((condition, condition.copy()))
            denoise = self.stages["denoise"].bind(self.buffers | {"time_condition": condition}, self.buffers)
            ahead = np.float32(0) if before is None else extrapolation(step - before, after - step)
            self._steps.append(_Step(denoise, moment, np.float32((after - step) / num_steps), ahead))

    def start(self, noise: np.ndarray | None, seed: int, stamp_ns: int) -> None:
        self._x[...] = noise_for(seed, stamp_ns, self.noise_shape) if noise is None else noise
        self._give_rows(0)
        self._lead = None

    def continue_(self, continuation: Continuation, target: np.ndarray) -> None:
        wanted, weights = np.zeros_like(self._x), np.zeros_like(self._x)
        wanted[0, : len(target), : target.shape[1]] = target
        weights[0, : len(target), : target.shape[1]] = continuation.weights[:, None]
        if rows := continuation.prefix:
            self._give_rows(rows)
            self._x[:, :rows] = wanted[:, :rows]
            stays = (np.arange(self._x.shape[1]) >= rows).astype(np.float32)[:, None]
            self._lead = lambda velocity, moment: velocity * stays
            return
        begin = max(continuation.begin, self._steps[-1].moment) + 1e-9

        def lead(velocity: np.ndarray, moment: float) -> np.ndarray:
            if moment > begin:
                return velocity
            return continuation.lead(self._x, velocity, moment, wanted, weights)

        self._lead = lead

    def acting(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for step in self._steps:
            yield "denoise", step.denoise
            velocity = step.velocity(self._velocity, self._previous)
            if self._lead is not None:
                velocity = self._lead(velocity, step.moment)
            # velocity points at the noise, which is where time 1 is
            self._x -= step.size * velocity

    def _condition(self, moment: float) -> np.ndarray:
        """What the denoise stage is told of a flow time, of its own: one for all rows, or one for each."""
        condition = self.stages["time"].run({"time": np.array([moment], np.float32)})["time_condition"]
        if self.spec.trained_prefix:
            condition = np.repeat(condition[:, None], self._x.shape[1], axis=1)
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
        x, previous = noise_for(seed, stamp_ns, self.noise_shape), np.zeros_like(self._velocity)
        for step in self._steps:
            inputs = buffers | {"x": x, "time_condition": self._condition(step.moment)}
            if step in (self._steps[0], self._steps[-1]):
                yield "time", {"time": np.array([step.moment], np.float32)}
                yield "denoise", inputs
            if step is not self._steps[-1]:
                (velocity,) = self.stages["denoise"].run(inputs).values()
                x = x - step.size * step.velocity(velocity, previous)
