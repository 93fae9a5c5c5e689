"""Policies that write their actions as tokens: the prompt is read once into a cache of static size, then the likeliest
token is taken, put behind what was read, and the next one asked for.

Only tokens of actions are scored, so decoding cannot leave them. A step reads the prompt's cache where it lies; what it
adds is one place of a short tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.loop import Loop
from vla_edge.policy.bins import bin_values
from vla_edge.policy.spec import PolicySpec


class _Tokens(Loop):
    """Actions by the bins that tokens stand for."""

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self.actions = np.zeros((1, spec.chunk_size, spec.max_action_dim))
        self._values = bin_values()


class RevisedTokenLoop(_Tokens):
    """Fixed-point (Jacobi) decoding (Santilli et al., 2023, arXiv:2305.10427; of action chunks PD-VLA, arXiv:2503.02310):
    all tokens are guessed, and every pass tells for each what follows those before it.

    What follows right tokens is right, so each pass makes at least one more of them right, and tokens that a pass leaves as
    they are are those of greedy decoding. The first guess is the last chunk: a robot seldom changes its mind at once.
    """

    NAMES, READS = ("vision", "prefill", "revise"), "prefill"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self.passes = 0  # of the last chunk
        self._revise = stages["revise"].bind(self.buffers, self.buffers)
        self._chosen = np.full(self.actions.size, len(self._values) // 2)

    def inputs(self, seed: int, stamp_ns: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        yield from super().inputs(seed, stamp_ns)
        self._read()
        for number, (name, call) in enumerate(self.acting()):
            if number == 0:
                yield name, {tensor: buffer.copy() for tensor, buffer in self.buffers.items()}
            call()

    def acting(self) -> Iterator[tuple[str, Callable[[], None]]]:
        tokens, chosen = self.buffers["tokens"], self._chosen
        chosen[0] = self.buffers["scores"].argmax()
        most = self.spec.most_passes or len(chosen) - 1
        for number in range(min(most, len(chosen) - 1)):
            tokens[...] = chosen[:-1]
            yield "revise", self._revise
            self.passes = number + 1
            told = self.buffers["row_scores"][0].argmax(-1)
            settled = (told[:-1] == chosen[1:-1]).all()
            chosen[1:] = told
            if settled:
                break
        self.actions.reshape(-1)[...] = self._values[chosen]


class GenerateLoop(_Tokens):
    """A runtime that reads the prompt and writes all tokens itself, and keeps the cache to itself."""

    NAMES, READS = ("vision", "generate"), "generate"

    def acting(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield from ()
        self.actions.reshape(-1)[...] = self._values[self.buffers["token_scores"][0].argmax(-1)]


class TokenLoop(_Tokens):
    """Greedy decoding of T x A tokens."""

    NAMES, READS = ("vision", "prefill", "decode"), "prefill"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self._decode = stages["decode"].bind(self.buffers, self.buffers)

    def inputs(self, seed: int, stamp_ns: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        yield from super().inputs(seed, stamp_ns)
        self._read()
        last = self.actions.size - 2
        for number, (name, call) in enumerate(self.acting()):
            if number in (0, last):
                yield name, {tensor: buffer.copy() for tensor, buffer in self.buffers.items()}
            call()

    def acting(self) -> Iterator[tuple[str, Callable[[], None]]]:
        buffers, chosen = self.buffers, self.actions.reshape(-1)
        for index in range(len(chosen)):
            token = int(buffers["scores"].argmax())
            chosen[index] = self._values[token]
            if index == len(chosen) - 1:
                return
            buffers["token"][...], buffers["step"][...] = token, index
            yield "decode", self._decode
            for kind in ("keys", "values"):
                buffers[f"tail_{kind}"][..., index, :] = buffers[f"new_{kind}"][..., 0, :]
