"""Policies that write their actions as tokens: the prompt is read once into a cache of static size, then the likeliest
token is taken, put behind what was read, and the next one asked for.

Only tokens of actions are scored, so decoding cannot leave them. A pass reads the prompt's cache where it lies; what it
adds is a place, or some, of a short tail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.drafting import ChunkHistory
from vla_edge.engine.loop import Loop
from vla_edge.policy.bins import bin_values
from vla_edge.policy.spec import PolicySpec

Calls = Iterator[tuple[str, Callable[[], None]]]


class _Tokens(Loop):
    """Actions by the bins that tokens stand for.

    A prompt may be read in blocks (`policy.openvla_tokens.BlockPrefill`). In a policy that looks back only, keys and values
    of a place stand as long as nothing before it changes: blocks before the first change are not read again.

    Attributes:
        shown: which calls of a decoding stage `inputs` gives, by number.
    """

    shown: tuple[int, ...] = (0,)

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self.actions = np.zeros((1, spec.chunk_size, spec.max_action_dim))
        self._values = bin_values()
        self._chosen = np.full(self.actions.size, len(self._values) // 2)
        self.decoded = len(self._chosen) - 1

    def told(self) -> dict[str, np.ndarray]:
        return {name: self.buffers[name] for name in ("lang_tokens", "lang_mask")}

    def reading(self, seen_before: Collection[int] = ()) -> Calls:
        if "begin" not in self.buffers:
            for call in super().reading(seen_before):
                yield call
                self._chosen[0] = self.buffers["scores"].argmax()
            return
        before = self._told
        if self.first_changed(seen_before) is not None:
            yield from self._blocks(self._first_place(seen_before, before))

    def _first_place(self, seen_before: Collection[int], before: Mapping[str, np.ndarray] | None) -> int:
        """The first place of the prompt that has to be read again, where the words were those of `before`: a word comes first,
        then all pictures, then the other words."""
        if before is None:
            return 0
        pictures = self.buffers["image_tokens"].shape[1]
        changed = [place for place in range(len(self.images)) if place not in seen_before]
        places = [1 + changed[0] * pictures // len(self.images)] if changed else []
        words = np.flatnonzero(np.any([(value != before[name])[0] for name, value in self.told().items()], axis=0))
        if words.size:
            places.append(int(words[0]) + pictures if words[0] else 0)
        return min(*places, self._last_place)

    @property
    def _last_place(self) -> int:
        """Of the last word, which tells the first token."""
        return self.buffers["image_tokens"].shape[1] + int(self.buffers["lang_mask"].sum()) - 1

    def _blocks(self, first: int) -> Calls:
        """Blocks from the one that holds place `first` to the one that holds the last word; the last block of a prompt ends
        with it and may read some places twice."""
        buffers = self.buffers
        block, length = buffers["block_keys"].shape[3], buffers["cache_mask"].shape[1]
        for begin in range(first // block * block, self._last_place + 1, block):
            begin = min(begin, length - block)
            buffers["begin"][...] = begin
            yield self.READS, self._read
            for kind in ("keys", "values"):
                buffers[f"cache_{kind}"][..., begin : begin + block, :] = buffers[f"block_{kind}"]
        self._chosen[0] = buffers["scores"].argmax()

    def inputs(self, seed: int, stamp_ns: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        yield from super().inputs(seed, stamp_ns)
        for _, call in self.reading():
            call()
        made: Counter[str] = Counter()
        for name, call in self.acting():
            if made[name] in self.shown:
                yield name, {tensor: buffer.copy() for tensor, buffer in self.buffers.items()}
            made[name] += 1
            call()

    def _finish(self) -> None:
        self.actions.reshape(-1)[...] = self._values[self._chosen]


class RevisedTokenLoop(_Tokens):
    """Fixed-point (Jacobi) decoding (Santilli et al., 2023, arXiv:2305.10427; of action chunks PD-VLA, arXiv:2503.02310):
    all tokens are guessed, and every pass tells for each what follows those before it.

    What follows right tokens is right, so each pass makes at least one more of them right, and tokens that a pass leaves as
    they are are those of greedy decoding. The first guess is the last chunk: a robot seldom changes its mind at once.
    """

    NAMES, READS = ("vision", "prefill", "revise"), "prefill"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self._revise = stages["revise"].bind(self.buffers, self.buffers)

    def acting(self) -> Calls:
        tokens, chosen = self.buffers["tokens"], self._chosen
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
        self._finish()


class GenerateLoop(_Tokens):
    """A runtime that reads the prompt and writes all tokens itself, and keeps the cache to itself."""

    NAMES, READS = ("vision", "generate"), "generate"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self.passes = self.decoded

    def reading(self, seen_before: Collection[int] = ()) -> Calls:
        return Loop.reading(self, seen_before)

    def acting(self) -> Calls:
        yield from ()
        self._chosen[...] = self.buffers["token_scores"][0].argmax(-1)
        self._finish()


class TokenLoop(_Tokens):
    """Greedy decoding, one token in a pass."""

    NAMES, READS = ("vision", "prefill", "decode"), "prefill"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self._decode = stages["decode"].bind(self.buffers, self.buffers)
        self.passes = self.decoded
        self.shown = (0, self.decoded - 1)

    def acting(self) -> Calls:
        buffers, chosen = self.buffers, self._chosen
        for index in range(len(chosen) - 1):
            buffers["token"][...], buffers["step"][...] = chosen[index], index
            yield "decode", self._decode
            chosen[index + 1] = buffers["scores"].argmax()
            for kind in ("keys", "values"):
                buffers[f"tail_{kind}"][..., index, :] = buffers[f"new_{kind}"][..., 0, :]
        self._finish()


class SpeculativeTokenLoop(_Tokens):
    """Speculative decoding (Leviathan et al., 2023, arXiv:2211.17192; Chen et al., 2023, arXiv:2302.01318): tokens that may
    come next are proposed, and one pass over the newest token and these tells what greedy decoding would have chosen after
    each. Those that it would have chosen stand, and so does its own choice after them, whatever was proposed.

    Proposed are tokens of earlier chunks (`drafting`).
    """

    NAMES, READS = ("vision", "prefill", "verify"), "prefill"

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self._verify = stages["verify"].bind(self.buffers, self.buffers)
        self._history = ChunkHistory(spec.draft_chunks or 1, len(self._chosen))
        self._proposed = np.zeros(0, np.int64)

    def acting(self) -> Calls:
        buffers, chosen = self.buffers, self._chosen
        window, tolerance = buffers["drafted"][0], self.spec.draft_tolerance
        known, self.passes = 1, 0
        while known < len(chosen):
            room = min(len(window), len(chosen) - known) - 1
            if room:
                yield from self._propose(known)
            proposed = self._proposed[:room]
            window[0], window[1:] = chosen[known - 1], 0
            window[1 : 1 + len(proposed)] = proposed
            buffers["step"][...] = known - 1
            yield "verify", self._verify
            self.passes += 1
            told = buffers["row_scores"][0].argmax(-1)
            right = np.abs(proposed - told[: len(proposed)]) <= tolerance
            accepted = len(right) if right.all() else int(right.argmin())
            self._keep(known - 1, accepted)
            chosen[known : known + accepted], chosen[known + accepted] = proposed[:accepted], told[accepted]
            known += accepted + 1
        self._history.add(chosen)
        self._finish()

    def _propose(self, known: int) -> Calls:
        """Sets `_proposed`, tokens that may follow the `known` ones."""
        yield from ()
        self._proposed = self._history.propose(self._chosen[:known], len(self._chosen))

    def _keep(self, step: int, accepted: int) -> None:
        """Keys and values of the window go where the next pass looks for them; of those that were not accepted it masks."""
        tail = self.buffers["tail_keys"].shape[3]
        count = min(self.buffers["new_keys"].shape[3], tail - step)
        for kind in ("keys", "values"):
            self.buffers[f"tail_{kind}"][..., step : step + count, :] = self.buffers[f"new_{kind}"][..., :count, :]


class DraftedTokenLoop(SpeculativeTokenLoop):
    """Speculative decoding of what a trained draft proposes (`policy.openvla_draft`)."""

    NAMES = (*SpeculativeTokenLoop.NAMES, "draft")

    def __init__(self, spec: PolicySpec, stages: Mapping[str, LoadedStage]):
        super().__init__(spec, stages)
        self._draft = stages["draft"].bind(self.buffers, self.buffers)

    def acting(self) -> Calls:
        self.buffers["feature"][...] = self.buffers["prompt_feature"]
        yield from super().acting()

    def _propose(self, known: int) -> Calls:
        self.buffers["step"][...] = known - 1
        if "known" in self.buffers:
            self.buffers["known"][0, :known] = self._chosen[:known]
        yield "draft", self._draft
        self._proposed = self.buffers["draft_scores"][0].argmax(-1)

    def _keep(self, step: int, accepted: int) -> None:
        super()._keep(step, accepted)
        self.buffers["feature"][...] = self.buffers["row_features"][:, accepted]
