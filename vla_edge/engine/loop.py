"""How the stages of an engine become actions: the part of a runner that differs between kinds of policies.

Every tensor has one buffer for the life of the loop and the stages are bound to these buffers, so nothing is allocated
or copied between stages, and keys and values are read in place by every later step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import ClassVar

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.continuation import Continuation
from vla_edge.policy.spec import PolicySpec
from vla_edge.types import VlaEdgeError


class RunnerError(VlaEdgeError):
    """An engine that cannot be run as asked, or that gave a result no robot may be shown."""


class Loop:
    """Buffers of all stages, and the vision stage bound once for each camera.

    Args:
        stages: those of `NAMES`.

    Attributes:
        NAMES: the stages of this kind of policy, in order. READS: the one that reads what the cameras see.
        buffers: name -> tensor. images: one (1, 3, H, W) per camera, for each observation that is read, oldest first.
        actions: (1, T, A) the last result, normalized.
        passes: of the language model over tokens behind the prompt, for the last result; `decoded`, tokens in them.
    """

    NAMES: ClassVar[tuple[str, ...]]
    READS: ClassVar[str]
    actions: np.ndarray
    passes = decoded = 0

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        self.spec, self.stages = spec, stages
        interfaces = {name: stages[name].interface for name in self.NAMES}
        tensors = [
            tensor for name, interface in interfaces.items() if name not in ("vision", "time")
            for tensor in (*interface.inputs, *interface.outputs)
        ]  # fmt: skip
        self.buffers = {tensor.name: tensor.zeros() for tensor in tensors}
        image, tokens = interfaces["vision"].inputs[0], interfaces["vision"].outputs[0]
        count = tokens.shape[1]
        self.images, self._vision = [], []
        for index in range(spec.observation_steps * len(spec.cameras)):
            part = self.buffers["image_tokens"][:, index * count : (index + 1) * count]
            self.images.append(image.zeros())
            self._vision.append(stages["vision"].bind({image.name: self.images[-1]}, {tokens.name: part}))
        self._read = stages[self.READS].bind(self.buffers, self.buffers)
        self._told: dict[str, np.ndarray] | None = None

    @classmethod
    def runs(cls, spec: PolicySpec) -> bool:
        """Whether a policy with these stages is run like this."""
        return spec.diffusion is None

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of what `start` takes."""
        return self.actions.shape

    @property
    def num_steps(self) -> int:
        """How often the network that makes actions is asked; 1 where there is no flow."""
        return 1

    def set_num_steps(self, num_steps: int, evaluated: Sequence[int] = ()) -> None:
        """Raises RunnerError: it is not possible."""
        if num_steps != 1:
            raise RunnerError(f"num_steps is {num_steps}, but this policy has no flow whose steps could be chosen")

    def start(self, noise: np.ndarray | None, seed: int, stamp_ns: int) -> None:
        """What the result is to start from, where it starts from noise; it continues nothing."""

    def continue_(self, continuation: Continuation, target: np.ndarray) -> None:
        """Have the result of the next `run` continue a plan; `target` (T, J) is the plan in the network's numbers.

        Raises:
            RunnerError: the policy cannot do that.
        """
        raise RunnerError("this policy has no flow that could continue a plan; choose another inference policy")

    def run(self, seen_before: Collection[int] = ()) -> dict[str, float]:
        """From the input buffers to `actions`; stage -> s.

        Args:
            seen_before: places of pictures whose tokens are still right.
        """
        vision = (("vision", call) for place, call in enumerate(self._vision) if place not in seen_before)
        times = dict.fromkeys(("vision", self.READS, self.NAMES[-1]), 0.0)
        last = time.perf_counter()
        stage = self.READS
        for stage, call in chain(vision, self.reading(seen_before), self.acting()):
            call()
            now = time.perf_counter()
            times[stage] = times.get(stage, 0.0) + now - last
            last = now
        times[stage] += time.perf_counter() - last  # what follows the last call belongs to it
        return times

    def calls(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """All of `run`, to be made one by one: stage and call, each before the next is asked for."""
        for vision in self._vision:
            yield "vision", vision
        yield from self.reading()
        yield from self.acting()

    def reading(self, seen_before: Collection[int] = ()) -> Iterator[tuple[str, Callable[[], None]]]:
        """From the tokens of pictures to what was read, as `calls`: nothing where all that is read stands since the last
        time, since a stage is a pure function."""
        if self.first_changed(seen_before) is not None:
            yield self.READS, self._read

    def first_changed(self, seen_before: Collection[int]) -> int | None:
        """The first place among what the policy reads whose token is another than the last time that this was asked; of
        policies whose places all see each other, 0. None where all are the same.

        Args:
            seen_before: as of `run`.
        """
        told = self.told()
        same = self._told is not None and all((value == self._told[name]).all() for name, value in told.items())
        self._told = {name: value.copy() for name, value in told.items()}
        return None if same and len(seen_before) == len(self.images) else 0

    def told(self) -> dict[str, np.ndarray]:
        """What is read beside pictures: words, and the state where it is read with them."""
        names = (spec.name for spec in self.stages[self.READS].interface.inputs)
        return {name: self.buffers[name] for name in names if name != "image_tokens"}

    def acting(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """From what was read to `actions`: as `calls`."""
        raise NotImplementedError

    def inputs(self, seed: int, stamp_ns: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """The inputs of every stage as they come up after an inference, in order; of many steps the first and last."""
        image = self.stages["vision"].interface.inputs[0].name
        for picture in self.images:
            yield "vision", {image: picture.copy()}
        yield self.READS, {name: buffer.copy() for name, buffer in self.buffers.items()}


class DirectLoop(Loop):
    """A policy that gives its whole chunk in one pass."""

    NAMES, READS = ("vision", "act"), "act"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self.actions = self.buffers["actions"]

    def acting(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """It is done."""
        yield from ()
