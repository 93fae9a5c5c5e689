"""What holds a measured engine back: a row of `bottleneck.LEVERS`, and the rule that finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vla_edge.engine.bottleneck import FLOW_STEPS, SMALL_OPERATORS
from vla_edge.engine.cost import ATTENTION, CACHE, COMPUTE, HOST, SCHEDULING, WEIGHTS
from vla_edge.engine.roofline import Roofline
from vla_edge.engine.work import Work

# What share counts as held back by it.
HOST_SHARE, TAIL, STEPS, NEAR, ATTENTION_SHARE, CACHE_SHARE = 0.3, 3.0, 0.6, 0.5, 0.4, 0.5
FEW_STEPS = 4


@dataclass(frozen=True)
class StageFigures:
    """One stage against what the computer can do.

    Attributes:
        ms: of one call. calls: in a chunk.
        flops_per_s, bytes_per_s: achieved. of_roofline: least possible time over the time taken.
        bottleneck: a key of `bottleneck.LEVERS`.
    """

    ms: float
    calls: int
    flops_per_s: float
    bytes_per_s: float
    of_roofline: float
    bottleneck: str


def stage_figures(milliseconds: float, calls: int, work: Work, roofline: Roofline) -> StageFigures:
    """Of a stage that takes `milliseconds` for all its `calls` in a chunk."""
    seconds = milliseconds / 1e3 / calls
    flops = {**work.flops, "float32": work.flops.get("float32", 0.0) + work.attention_flops}
    compute, memory = roofline.seconds(flops, 0), roofline.seconds({}, work.all_bytes)
    least = max(compute, memory)
    if least < NEAR * seconds and not _mostly_attention(work):
        label = SMALL_OPERATORS
    elif _mostly_attention(work) and memory < compute:
        label = ATTENTION
    elif memory >= compute:
        label = CACHE if work.cache_bytes > CACHE_SHARE * work.all_bytes else WEIGHTS
    else:
        label = COMPUTE
    return StageFigures(
        1e3 * seconds, calls, work.all_flops / seconds, work.all_bytes / seconds, min(1.0, least / seconds), label
    )


def chunk_bottleneck(parts: Mapping[str, Mapping[str, float]], stages: Mapping[str, StageFigures]) -> str:
    """What holds the whole chunk back.

    Args:
        parts: as of `profile.profile`: part -> p50, p95, p99 in ms, with "total".
        stages: figures of those stages whose work is known.
    """
    total = parts["total"]
    names = [name for name in parts if name not in ("preprocess", "postprocess", "total")]
    host = sum(parts[name]["p50"] for name in ("preprocess", "postprocess") if name in parts)
    if host > HOST_SHARE * total["p50"]:
        return HOST
    if total["p99"] > TAIL * total["p50"]:
        return SCHEDULING
    slowest = max(names, key=lambda name: parts[name]["p50"])
    figures = stages.get(slowest)
    if figures is None:
        return COMPUTE
    if figures.calls > FEW_STEPS and parts[slowest]["p50"] > STEPS * total["p50"]:
        return FLOW_STEPS
    return figures.bottleneck


def _mostly_attention(work: Work) -> bool:
    return work.attention_flops > ATTENTION_SHARE * work.all_flops
