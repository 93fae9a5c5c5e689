"""Many inferences together: each goes on to its next call of a stage, then the calls of all are made.

So a stage that does not fit into memory beside the others is brought there once for many observations. What happens
between the calls is the runner's own, and so are the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vla_edge.engine.backends import LoadedStage, StageInterface
from vla_edge.engine.runner import Runner
from vla_edge.types import ActionChunk, Observation


@dataclass(frozen=True)
class Call:
    """One call of a stage: the arrays that it reads, and those that it overwrites."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


class Performer(Protocol):
    """Makes calls of stages that are brought into memory for them."""

    interfaces: Mapping[str, StageInterface]

    def perform(self, stage: str, calls: Sequence[Call]) -> None: ...


Seen = Callable[["int | None", str, Call], None]
"""Of the place of an observation, or None where all of them need the call; a stage; and a call that is about to be made."""


class Deferred:
    """A stage, as a runner has it, whose calls are for a `Performer` to make. Those that a runner does not wait for, of what
    depends on flow time alone, are made at once, and a single time for all runners."""

    def __init__(self, interface: StageInterface, performer: Performer, seen: Seen):
        self.interface, self._performer, self._seen = interface, performer, seen
        self._known: dict[bytes, dict[str, np.ndarray]] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        asked = b"".join(inputs[spec.name].tobytes() for spec in self.interface.inputs)
        if asked not in self._known:
            call = Call(inputs, {spec.name: spec.zeros() for spec in self.interface.outputs})
            self._seen(None, self.interface.name, call)
            self._performer.perform(self.interface.name, [call])
            self._known[asked] = dict(call.outputs)
        return self._known[asked]

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Call:
        return Call(inputs, outputs)


class InTurn:
    """Loaded stages of which one at a time is in memory.

    Args:
        load: stage -> ready to run.
    """

    def __init__(self, interfaces: Mapping[str, StageInterface], load: Callable[[str], LoadedStage]):
        self.interfaces, self._load = interfaces, load
        self._held: tuple[str, LoadedStage] | None = None

    def perform(self, stage: str, calls: Sequence[Call]) -> None:
        if self._held is None or self._held[0] != stage:
            self._held = None  # before the next is loaded
            self._held = stage, self._load(stage)
        for call in calls:
            self._held[1].bind(call.inputs, call.outputs)()


def infer_together(
    make: Callable[[Mapping[str, Deferred]], Runner],
    performer: Performer,
    observations: Sequence[Observation],
    seed: int = 0,
    most_bytes: int = 1 << 30,
    seen: Seen = lambda place, stage, call: None,
    until: str | None = None,
) -> Iterator[list[ActionChunk | None]]:
    """Chunks of `observations` in order, as many at a time as advance together.

    Args:
        make: a runner of such stages, with buffers of its own.
        most_bytes: of the buffers of all runners that advance together; of one alone in any case.
        until: a stage before whose first call each inference ends, once it is `seen`; there are no chunks then.
    """
    stages = {name: Deferred(interface, performer, seen) for name, interface in performer.interfaces.items()}
    runners = [make(stages)]
    count = max(1, min(len(observations), most_bytes // runners[0].buffer_bytes))
    runners += [make(stages) for _ in range(count - 1)]
    for begin in range(0, len(observations), count):
        group = observations[begin : begin + count]
        yield _advance(
            runners, group, performer, seed, lambda place, *call, begin=begin: seen(begin + place, *call), until
        )


def _advance(
    runners, observations, performer: Performer, seed: int, seen: Seen, until: str | None
) -> list[ActionChunk | None]:
    chunks: list = [None] * len(observations)
    walks = [runner.steps(observation, seed) for runner, observation in zip(runners, observations)]
    waiting: dict[int, tuple[str, Call]] = {}

    def advance(place: int) -> None:
        waiting.pop(place, None)
        try:
            waiting[place] = next(walks[place])
        except StopIteration as end:
            chunks[place] = end.value

    for place in range(len(walks)):
        advance(place)
    while waiting:
        stage = waiting[min(waiting)][0]
        now = [place for place in sorted(waiting) if waiting[place][0] == stage]
        for place in now:
            seen(place, stage, waiting[place][1])
        if stage == until:
            for place in now:
                del waiting[place]
            continue
        performer.perform(stage, [waiting[place][1] for place in now])
        for place in now:
            advance(place)
    return chunks
