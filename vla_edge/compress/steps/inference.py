"""Steps that say how the policy is inferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vla_edge.compress.steps.checks import number, one_of, whole
from vla_edge.engine.drafting import MOST_CHUNKS


@dataclass(frozen=True)
class PruneTokens:
    """Go on with the image tokens that matter, after the first text layers; what follows gets shorter, and so does the
    cache that each flow step reads. Which they are is decided anew for each observation, see `prune.tokens`.

    Attributes:
        keep: share of the image tokens of all cameras together that stay, above 0, below 1.
        after: text layers that see all of them.
        by: what tells which stay: "action" for looks weighed by head and place, as far as they tell how the chunk moves;
            "attention" for the mean over the heads, as in FastV.
    """

    key: ClassVar[str] = "prune_tokens"
    changes_policy: ClassVar[bool] = True
    keep: float = 0.5
    after: int = 2
    by: str = "action"

    @property
    def needs_statistics(self) -> bool:
        """Whether it looks at data."""
        return self.by == "action"

    def check(self) -> None:
        number("keep", self.keep, 0, 1, "above 0, below 1")
        if self.keep == 1:
            raise ValueError("keep is 1, allowed is above 0, below 1; all tokens stay without this step")
        whole("after", self.after)
        one_of("by", self.by, ("action", "attention"))

    def kept(self, tokens: int) -> int:
        """Of so many image tokens, how many stay."""
        return round(self.keep * tokens)


@dataclass(frozen=True)
class KVCache:
    """Hand the prefix's keys and values to the flow steps in few bits, see `quantize.kv_cache`.

    Attributes:
        bits: 8 or 4.
        values: "token" for a grid of each token's values, "channel" for one of each channel, as keys have.
        salient: share of the tokens, those that are looked at most, that keep 8 bits where the others get 4.
    """

    key: ClassVar[str] = "kv_cache"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    bits: int = 8
    values: str = "token"
    salient: float = 0.0

    def check(self) -> None:
        one_of("bits", self.bits, (8, 4))
        one_of("values", self.values, ("token", "channel"))
        number("salient", self.salient, -1e-12, 1, "0 to below 1")
        if self.salient == 1 or self.salient and self.bits == 8:
            raise ValueError(f"salient is {self.salient!r}, allowed is 0 to below 1, and 0 where all tokens get 8 bits")

    def salient_tokens(self, tokens: int) -> int:
        """Of so many tokens, how many keep 8 bits."""
        return round(self.salient * tokens)


@dataclass(frozen=True)
class FlowSteps:
    """Go from noise to actions in another number of flow steps, or ask the network in some of them alone, with the policy
    as it is; see `flow_steps`.

    Attributes:
        num_steps: Euler steps, of equal length; the checkpoint's own when None.
        evaluations: so many of them ask the network, those that change the actions least; all when None.
    """

    key: ClassVar[str] = "flow_steps"
    changes_policy: ClassVar[bool] = False
    num_steps: int | None = None
    evaluations: int | None = None

    @property
    def needs_statistics(self) -> bool:
        return self.evaluations is not None

    @property
    def calls(self) -> int:
        """How often the network is asked."""
        return self.evaluations or self.num_steps

    def check(self) -> None:
        if self.num_steps is None and self.evaluations is None:
            raise ValueError("num_steps and evaluations are both left out; give one or both")
        for name in ("num_steps", "evaluations"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))


@dataclass(frozen=True)
class VisionCacheStep:
    """Use the tokens of a camera's picture again while hardly anything in it changes, see `engine.vision_cache`.

    Attributes:
        change: mean absolute difference, 0 to 1, of the block of the picture that differs most, up to which they hold.
    """

    key: ClassVar[str] = "vision_cache"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = False
    change: float = 0.15

    def check(self) -> None:
        number("change", self.change, 0, 1, "above 0, to 1")


@dataclass(frozen=True)
class FixedPoint:
    """Decode all tokens of a chunk together, from a guess until they stand, see `engine.token_loop`.

    Attributes:
        most_passes: after which tokens are taken as they are, which bounds the time and may change the chunk; None for as
            many as it takes, with the chunk of decoding one by one.
    """

    key: ClassVar[str] = "fixed_point"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    most_passes: int | None = None

    def check(self) -> None:
        if self.most_passes is not None:
            whole("most_passes", self.most_passes)


@dataclass(frozen=True)
class Speculate:
    """Verify tokens that a draft proposes, several in a pass, see `engine.token_loop`: the chunk of decoding one by one, in
    fewer passes where the draft is right.

    Attributes:
        draft: "trained" for the checkpoint's own, "history" for tokens of earlier chunks, "none" to decode one by one although
            the checkpoint has a draft, "auto" for the trained one where there is one.
        tokens: that are proposed at a time; 4, or as many as can be, when None.
        chunks: that "history" remembers.
        tolerance: bins by which a proposed token may differ from the likeliest and still stand, of 256; above 0 it may change
            the chunk (relaxed acceptance; Spec-VLA, Wang et al., 2025, arXiv:2507.22424).
    """

    key: ClassVar[str] = "speculate"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    draft: str = "auto"
    tokens: int | None = None
    chunks: int = 8
    tolerance: int = 0

    def check(self) -> None:
        one_of("draft", self.draft, ("auto", "trained", "history", "none"))
        if self.tokens is not None:
            whole("tokens", self.tokens)
        whole("chunks", self.chunks)
        if self.chunks > MOST_CHUNKS:
            raise ValueError(f"chunks is {self.chunks}, allowed is 1 to {MOST_CHUNKS}")
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, int) or not 0 <= self.tolerance < 256:
            raise ValueError(f"tolerance is {self.tolerance!r}, allowed is a whole number of bins, 0 to 255")


@dataclass(frozen=True)
class PrefillBlocks:
    """Read the prompt a block of places at a time, so that what lies between layers is no longer than a block; blocks before
    the first change since the last observation are not read again. See `policy.openvla_tokens.BlockPrefill`.

    Attributes:
        size: places of a block; a shorter prompt is one block.
    """

    key: ClassVar[str] = "prefill_blocks"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    size: int = 64

    def check(self) -> None:
        whole("size", self.size)
