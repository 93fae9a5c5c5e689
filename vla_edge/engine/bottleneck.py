"""What holds an engine back, and the next lever to pull: one table, and the rule that finds the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vla_edge.engine.roofline import Roofline
from vla_edge.engine.work import Work

# bottleneck -> lever
LEVERS = {
    "host work": "take less time outside the network: smaller or raw images, the crop done by the camera",
    "scheduling": "give the engine processors of its own: priority, isolated cores, stay_awake, fewer other processes",
    "flow steps": "fewer flow steps: num_steps at run time, or a recipe with distillation to 2 to 4 steps",
    "weight bandwidth": "fewer bits per weight: int4-awq, or mixed by vla-edge sensitivity",
    "KV cache": "a shorter prefix: fewer cameras, smaller images, fewer image tokens; or a cache in fewer bits",
    "attention kernels": "fewer tokens: smaller images or a larger scale factor; or a runtime with fused attention",
    "compute": "integer products: int8; or fewer of them: pruned heads and channels, low rank",
    "small operators": "fewer, larger operators: another runtime for this stage (--backend auto), one thread",
}
# What share counts as held back by it.
HOST, TAIL, STEPS, NEAR, ATTENTION, CACHE = 0.3, 3.0, 0.6, 0.5, 0.4, 0.5
FEW_STEPS = 4


@dataclass(frozen=True)
class StageFigures:
    """One stage against what the computer can do.

    Attributes:
        ms: of one call. calls: in a chunk.
        flops_per_s, bytes_per_s: achieved. of_roofline: least possible time over the time taken.
        bottleneck: a key of LEVERS.
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
        label = "small operators"
    elif _mostly_attention(work) and memory < compute:
        label = "attention kernels"
    elif memory >= compute:
        label = "KV cache" if work.cache_bytes > CACHE * work.all_bytes else "weight bandwidth"
    else:
        label = "compute"
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
    if host > HOST * total["p50"]:
        return "host work"
    if total["p99"] > TAIL * total["p50"]:
        return "scheduling"
    slowest = max(names, key=lambda name: parts[name]["p50"])
    figures = stages.get(slowest)
    if figures is None:
        return "compute"
    if figures.calls > FEW_STEPS and parts[slowest]["p50"] > STEPS * total["p50"]:
        return "flow steps"
    return figures.bottleneck


def _mostly_attention(work: Work) -> bool:
    return work.attention_flops > ATTENTION * work.all_flops
