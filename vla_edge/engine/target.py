"""Which engine reaches a rate, within an error and a memory? Build, measure, pull the lever of what holds it back, again.

The first engine is full precision: what it is held back by says what to try next (`bottleneck.MOVES`). An engine that
errs more than is allowed, or gains nothing, is not gone on from. The search ends when the target is reached, or when
nothing is left to pull; then it says what is in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from vla_edge.compress.recipe import Accept, Recipe, load_recipe
from vla_edge.compress.steps import FewSteps, FlowSteps, KVCache, PruneTokens
from vla_edge.engine.bottleneck import (
    LESS_BITS,
    LESS_CACHE,
    LESS_PRODUCTS,
    LESS_STEPS,
    LESS_TOKENS,
    LEVERS,
    MEMORY,
    MOVES,
)
from vla_edge.types import VlaEdgeError

MOST_ERROR = 0.03
"""Of the motion, where nothing else is said: beyond it the harder tier of the reference policy is lost quickly."""
MOST_ATTEMPTS = 12
# What an engine has to gain, or the next one is tried from the one before it.
LEAST_GAIN = 0.03

_FULL = "fp32"
_BITS = ("int8", "int4-awq", "int4-gptq")
_PRODUCTS = ("int8", "int8-static")
_TOKENS = (0.75, 0.5)
_CACHE = (8, 4)


class TargetError(VlaEdgeError):
    """A target that says nothing, or cannot be one."""


@dataclass(frozen=True)
class Target:
    """What an engine has to reach on this computer.

    Attributes:
        rate_hz: chunks a second that 19 of 20 inferences keep; not asked for when None.
        memory_bytes: most memory of a process with the engine; not asked for when None.
        action_error_rel: most action error, relative to the motion.
    """

    rate_hz: float | None = None
    memory_bytes: float | None = None
    action_error_rel: float = MOST_ERROR

    def __post_init__(self):
        if self.rate_hz is None and self.memory_bytes is None:
            raise TargetError("a target needs a rate or a memory; every engine without limits reaches it")
        for name in ("rate_hz", "memory_bytes", "action_error_rel"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise TargetError(f"target {name} is {value!r}, allowed is a number above 0")

    def missed(self, attempt: Attempt) -> dict[str, float]:
        """What `attempt` does not reach -> by which factor."""
        found = {}
        if self.rate_hz is not None and attempt.rate_hz < self.rate_hz:
            found["rate"] = self.rate_hz / attempt.rate_hz
        if self.memory_bytes is not None and attempt.memory_bytes > self.memory_bytes:
            found["memory"] = attempt.memory_bytes / self.memory_bytes
        return found


@dataclass(frozen=True)
class Draft:
    """How much is taken from the policy.

    Attributes:
        precision: name of a shipped recipe. flow_steps: that ask the network; the checkpoint's own when None.
        keep_vision: share of the image tokens. cache_bits: of keys and values; as they are when None.
    """

    precision: str = _FULL
    flow_steps: int | None = None
    keep_vision: float = 1.0
    cache_bits: int | None = None

    @property
    def name(self) -> str:
        """Short, and fit for a file."""
        parts = [self.precision]
        parts += [] if self.flow_steps is None else [f"{self.flow_steps}steps"]
        parts += [] if self.keep_vision == 1 else [f"{round(100 * self.keep_vision)}tokens"]
        parts += [] if self.cache_bits is None else [f"kv{self.cache_bits}"]
        return "-".join(parts)

    def recipe(self, trains: bool = False) -> Recipe:
        """As a recipe, without limits; with `trains`, the policy learns to do with fewer flow steps."""
        steps = []
        if self.flow_steps is not None and not trains:
            steps.append(FlowSteps(evaluations=self.flow_steps))
        if self.keep_vision < 1:
            steps.append(PruneTokens(self.keep_vision))
        if self.flow_steps is not None and trains:
            steps.append(FewSteps(self.flow_steps))
        steps += load_recipe(self.precision).steps
        if self.cache_bits is not None:
            steps.append(KVCache(self.cache_bits, "channel", 0.2 if self.cache_bits == 4 else 0.0))
        return Recipe(self.name, tuple(steps), Accept(), "What a build towards a target came to.")


@dataclass(frozen=True)
class Attempt:
    """One engine, measured; or why there is none.

    Attributes:
        because: what the one before was held back by.
        p50_ms, p95_ms: of a chunk. action_error_rel: by the build, on observations it did not see.
        memory_bytes: most memory of a process with it. bundle_bytes: of its files.
        bottleneck: what holds it back. failure: why it could not be built; its other figures are 0 then.
    """

    draft: Draft
    because: str = ""
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    action_error_rel: float = 0.0
    memory_bytes: int = 0
    bundle_bytes: int = 0
    bottleneck: str = ""
    failure: str = ""

    @property
    def rate_hz(self) -> float:
        """Chunks a second that 19 of 20 inferences keep."""
        return 1e3 / self.p95_ms if self.p95_ms else 0.0

    def to_dict(self) -> dict:
        """Plain types; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict) -> Attempt:
        """Of `to_dict`."""
        return cls(**{**plain, "draft": Draft(**plain["draft"])})


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        attempts: in the order they were made. best: the one gone on from last; None when nothing could be built.
        bottleneck: what is in the way of the best; empty when the target is reached.
    """

    target: Target
    attempts: tuple[Attempt, ...]
    best: Attempt | None
    bottleneck: str = ""

    @property
    def lever(self) -> str:
        """What a person can do about it."""
        return LEVERS.get(self.bottleneck, "")

    @property
    def reached(self) -> bool:
        """Whether the best reaches the target."""
        return self.best is not None and not self.bottleneck


def pursue(
    target: Target,
    flow_steps: int,
    attempt: Callable[[Draft, str], Attempt],
    drop: Callable[[Attempt], None] = lambda loser: None,
    most: int = MOST_ATTEMPTS,
) -> Outcome:
    """Attempts until one reaches the target or nothing is left to try.

    Args:
        flow_steps: of the checkpoint; 1 where it has none.
        attempt: builds and measures, told what the last was held back by. drop: told which will not be needed.
        most: attempts.
    """
    tried: dict[Draft, Attempt] = {}
    best, draft, because = None, Draft(), "where it starts from"
    while draft is not None and len(tried) < most:
        found = tried[draft] = attempt(draft, because)
        if _better(found, best, target):
            best, loser = found, best
        else:
            loser = found
        if loser is not None:
            drop(loser)
        if best is not None and not target.missed(best):
            return Outcome(target, tuple(tried.values()), best)
        because = MEMORY if best is None else _held_back(best, target)
        base = Draft() if best is None else best.draft
        draft = next((d for move in MOVES[because] for d in moved(base, move, flow_steps) if d not in tried), None)
    return Outcome(target, tuple(tried.values()), best, because)


def moved(draft: Draft, move: str, flow_steps: int) -> Iterator[Draft]:
    """What a move makes of a draft, the least first; of flow steps the next alone."""
    if move == LESS_PRODUCTS:
        yield from (replace(draft, precision=name) for name in _PRODUCTS if draft.precision == _FULL)
    elif move == LESS_BITS:
        ladder = (_FULL, *_BITS)
        if draft.precision in ladder:
            yield from (replace(draft, precision=name) for name in ladder[ladder.index(draft.precision) + 1 :])
    elif move == LESS_STEPS:
        steps = (draft.flow_steps or flow_steps) // 2
        if steps:
            yield replace(draft, flow_steps=steps)
    elif move == LESS_TOKENS:
        yield from (replace(draft, keep_vision=kept) for kept in _TOKENS if kept < draft.keep_vision)
    else:
        assert move == LESS_CACHE
        yield from (replace(draft, cache_bits=bits) for bits in _CACHE if bits < (draft.cache_bits or 32))


def _better(found: Attempt, best: Attempt | None, target: Target) -> bool:
    """Whether to go on from it: within the error, and nearer to the target."""
    # written so that NaN is no gain
    if found.failure or not found.action_error_rel <= target.action_error_rel:
        return False
    if best is None:
        return True
    short, before = (sum(value - 1 for value in target.missed(a).values()) for a in (found, best))
    return short < before * (1 - LEAST_GAIN)


def _held_back(best: Attempt, target: Target) -> str:
    """A key of `bottleneck.MOVES`: memory where that is what misses the target most."""
    missed = target.missed(best)
    return MEMORY if max(missed, key=missed.get) == "memory" else best.bottleneck
