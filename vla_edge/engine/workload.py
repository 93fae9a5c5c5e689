"""What one inference is asked to do: cameras, flow steps, how actions are decoded, what is left out."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vla_edge.types import VlaEdgeError

if TYPE_CHECKING:
    from vla_edge.engine.architectures import Architecture

KV_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
TOKENS_PER_PASS = 2.5  # of fixed-point decoding, unless a workload says how many passes
DRAFTS = ("block", "history")
DECODINGS = ("autoregressive", "speculative", "fixed-point", "parallel")


class WorkloadError(VlaEdgeError):
    """Options that an architecture does not have, or values that make no sense."""


@dataclass(frozen=True)
class Scheme:
    """How the tokens of a chunk come about.

    Attributes:
        in_prefill: all of them in the pass over the observation.
        passes: over the language model after it, each over `rows` tokens; `per` says what a pass is for.
        drafts: passes of a trained draft, each over all places of the chunk.
    """

    in_prefill: bool
    passes: float
    rows: int
    per: str
    drafts: float = 0


@dataclass(frozen=True)
class Workload:
    """One inference.

    Attributes:
        cameras: pictures. prompt_tokens: of the instruction. chunk: actions. steps: of the flow.
        keep_vision: share of each picture's tokens that the language model goes on with, above 0, to 1. keep_after: layers
            that see all of them first.
        kv: precision of the cache of keys and values; None for that of the activations.
        decoding: of policies whose actions are tokens: "autoregressive"; "speculative" (`draft` tokens are
            proposed at a time, each accepted with probability `acceptance`, by a `drafter`: a trained "block", of the shape
            that `vla-edge draft` gives it, or "history", earlier chunks, which costs nothing; Leviathan et al., 2023,
            arXiv:2211.17192; one half gives about the 1.4 times that Spec-VLA, arXiv:2507.22424, reports); "fixed-point" (all tokens of the
            chunk at once, `iterations` times until they stand: Jacobi decoding, Santilli et al., 2023,
            arXiv:2305.10427; None for a pass per 2.5 tokens, after PD-VLA, arXiv:2503.02310, which gained 2.52 times);
            "parallel" (one pass, for which a policy has to be trained: OpenVLA-OFT, arXiv:2502.19645).
    """

    cameras: int
    prompt_tokens: int
    chunk: int
    steps: int
    keep_vision: float = 1.0
    keep_after: int = 2
    kv: str | None = None
    decoding: str = "autoregressive"
    draft: int = 4
    acceptance: float = 0.5
    drafter: str = "block"
    iterations: int | None = None

    @classmethod
    def of(cls, architecture: Architecture, **changes) -> Workload:
        """The architecture's own, but for `changes` that are not None."""
        known = {
            "cameras": architecture.cameras,
            "prompt_tokens": architecture.prompt_tokens,
            "chunk": architecture.chunk,
            "steps": architecture.steps,
            "decoding": "parallel" if architecture.parallel else "autoregressive",
        }
        return cls(**{**known, **{key: value for key, value in changes.items() if value is not None}})

    def check(self, architecture: Architecture) -> None:
        """Nothing, when `architecture` can be asked this.

        Raises:
            WorkloadError: what is wrong, and what is allowed.
        """
        for name in ("cameras", "prompt_tokens", "chunk", "steps", "keep_after", "draft", "iterations"):
            value = getattr(self, name)
            if value is None and name == "iterations":
                continue
            least = min(1, getattr(architecture, name, 1))  # of words some policies read none
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 100_000:
                raise WorkloadError(f"{name} is {value!r}, allowed is a whole number of at least {least}")
        for name, low in (("keep_vision", 0), ("acceptance", 0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low < value <= 1:
                raise WorkloadError(f"{name} is {value!r}, allowed is above 0, to 1")
        if self.kv is not None and self.kv not in KV_BITS:
            raise WorkloadError(f"kv is {self.kv!r}, allowed is {', '.join(KV_BITS)}")
        if self.decoding not in DECODINGS:
            nearest = difflib.get_close_matches(str(self.decoding), DECODINGS, n=1, cutoff=0.0)[0]
            raise WorkloadError(f"there is no decoding {self.decoding!r}; did you mean {nearest!r}?")
        if not architecture.decodes and self.decoding != "autoregressive":
            made = "in flow steps" if architecture.is_flow else "in one pass"
            raise WorkloadError(f"{architecture.name} makes its chunk {made} and decodes no tokens; leave decoding out")
        if self.drafter not in DRAFTS:
            raise WorkloadError(f"drafter is {self.drafter!r}, allowed is {' or '.join(DRAFTS)}")
        if not architecture.is_flow and self.steps != 1:
            made = "decodes tokens" if architecture.decodes else "makes its chunk in one pass"
            raise WorkloadError(f"{architecture.name} {made} and has no flow; leave steps out")
        if architecture.parallel and self.decoding != "parallel":
            raise WorkloadError(
                f"{architecture.name} is trained to give all its actions in one pass; decoding is parallel"
            )

    def action_tokens(self, architecture: Architecture) -> int:
        """Tokens that are decoded for one chunk."""
        return self.chunk * architecture.action_dim

    def scheme(self, architecture: Architecture) -> Scheme:
        """The passes that this decoding takes."""
        tokens = self.action_tokens(architecture)
        if self.decoding == "parallel":
            return Scheme(True, 0, 0, "pass")
        if self.decoding == "fixed-point":
            passes = self.iterations or math.ceil(tokens / TOKENS_PER_PASS)
            return Scheme(False, min(passes, tokens), tokens, "pass")
        if self.decoding == "speculative":
            rate = self.acceptance
            won = self.draft + 1 if rate == 1 else (1 - rate ** (self.draft + 1)) / (1 - rate)
            passes = (tokens - 1) / won
            return Scheme(False, passes, self.draft + 1, "pass", passes if self.drafter == "block" else 0)
        return Scheme(False, tokens - 1, 1, "token")  # the first comes out of the prefill
