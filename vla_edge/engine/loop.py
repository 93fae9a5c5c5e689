"""How the stages of an engine become actions: the part of a runner that differs between kinds of policies.

Every tensor has one buffer for the life of the loop and the stages are bound to these buffers, so nothing is allocated
or copied between stages, and keys and values are read in place by every later step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    """

    NAMES: ClassVar[tuple[str, ...]]
    READS: ClassVar[str]
    actions: np.ndarray

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
        begin = time.perf_counter()
        for place, vision in enumerate(self._vision):
            if place not in seen_before:
                vision()
        seen = time.perf_counter()
        self._read()
        read = time.perf_counter()
        for _, call in self.acting():
            call()
        times = {"vision": seen - begin, self.READS: read - seen}
        return times | ({self.NAMES[-1]: time.perf_counter() - read} if self.NAMES[-1] != self.READS else {})

    def calls(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """All of `run`, to be made one by one: stage and call, each before the next is asked for."""
        for vision in self._vision:
            yield "vision", vision
        yield self.READS, self._read
        yield from self.acting()

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
