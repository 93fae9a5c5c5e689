"""Policies that write their actions as tokens: the prompt is read once into a cache of static size, then the likeliest
token is taken, put behind what was read, and the next one asked for.

Only tokens of actions are scored, so decoding cannot leave them. A step reads the cache where it lies; what it adds is
one place of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.loop import Loop
from vla_edge.policy.bins import bin_values
from vla_edge.policy.spec import PolicySpec


class TokenLoop(Loop):
    """Greedy decoding of T x A tokens."""

    NAMES, READS = ("vision", "prefill", "decode"), "prefill"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self.actions = np.zeros((1, spec.chunk_size, spec.max_action_dim))
        self._decode = stages["decode"].bind(self.buffers, self.buffers)
        self._values = bin_values()

    def act(self) -> None:
        for _ in self._steps():
            pass

    def inputs(self, seed: int, stamp_ns: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        yield from super().inputs(seed, stamp_ns)
        self._read()
        last = self.actions.size - 2
        for step in self._steps():
            if step in (0, last):
                yield "decode", {name: buffer.copy() for name, buffer in self.buffers.items()}

    def _steps(self) -> Iterator[int]:
        """Every token, from the scores that were read; stops before each decoding, its inputs ready."""
        buffers, chosen = self.buffers, self.actions.reshape(-1)
        for index in range(len(chosen)):
            token = int(buffers["scores"].argmax())
            chosen[index] = self._values[token]
            if index == len(chosen) - 1:
                return
            buffers["token"][...] = token
            yield index
            self._decode()
            place = int(buffers["position"][0])
            for kind in ("keys", "values"):
                buffers[f"cache_{kind}"][..., place, :] = buffers[f"new_{kind}"][..., 0, :]
            buffers["position"] += 1
