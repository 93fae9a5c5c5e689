"""What takes most of an inference's time, and what to do about it: one table, for plans and for measurements.

The rule for plans is here, that for measured engines in `stage_figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vla_edge.engine.cost import ATTENTION, CACHE, COMPUTE, HOST, POINTWISE, SCHEDULING, WEIGHTS

if TYPE_CHECKING:
    from vla_edge.compress.recipe import Recipe
    from vla_edge.engine.architectures import Architecture
    from vla_edge.engine.workload import Workload

FLOW_STEPS, SMALL_OPERATORS, MEMORY = "flow steps", "small operators", "memory"
# From this share of the time on, the number of calls is what to change, before anything inside of one.
REPEATED = 0.5

LEVERS = {
    WEIGHTS: "fewer bits per weight: int4-awq, or mixed by vla-edge sensitivity",
    COMPUTE: "products in fewer bits (int8 or fp8 inputs, not weights alone), fewer of them (prune-structured, low rank), or "
    "fewer vision tokens",
    ATTENTION: "fewer vision tokens (prune_tokens, smaller images), or a runtime with fused attention",
    CACHE: "the cache of keys and values in 8 or 4 bits (kv_cache), or fewer vision tokens",
    POINTWISE: "a runtime that fuses norms, activations and rounding into the products",
    SMALL_OPERATORS: "fewer, larger operators: another runtime for this stage (--backend auto), one thread",
    SCHEDULING: "a recorded graph (CUDA graph) or fewer and larger kernels; processors of its own: priority, isolated cores, "
    "stay_awake",
    HOST: "less work outside the network: the crop done by the camera, pictures resized once, fewer or smaller cameras",
    FLOW_STEPS: "fewer flow steps: a recipe with flow_steps, or with few_steps that trains for them; num_steps at run time",
    MEMORY: "fewer bits per weight: int8, int4-awq, or mixed by vla-edge sensitivity; the cache in 8 or 4 bits (kv_cache)",
}
"""Bottleneck -> the lever to pull next."""
LESS_PRODUCTS, LESS_BITS, LESS_STEPS, LESS_TOKENS, LESS_CACHE = "products", "bits", "flow steps", "tokens", "cache"
MOVES = {
    WEIGHTS: (LESS_BITS, LESS_STEPS, LESS_TOKENS, LESS_CACHE),
    COMPUTE: (LESS_PRODUCTS, LESS_TOKENS, LESS_STEPS, LESS_BITS),
    ATTENTION: (LESS_TOKENS, LESS_STEPS, LESS_PRODUCTS, LESS_BITS),
    CACHE: (LESS_CACHE, LESS_TOKENS, LESS_STEPS, LESS_BITS),
    POINTWISE: (LESS_STEPS, LESS_TOKENS, LESS_PRODUCTS, LESS_BITS),
    SMALL_OPERATORS: (LESS_STEPS, LESS_PRODUCTS, LESS_TOKENS, LESS_BITS),
    SCHEDULING: (LESS_STEPS, LESS_PRODUCTS, LESS_TOKENS, LESS_BITS),
    HOST: (LESS_PRODUCTS, LESS_STEPS, LESS_TOKENS, LESS_BITS),
    FLOW_STEPS: (LESS_STEPS, LESS_PRODUCTS, LESS_BITS, LESS_TOKENS),
    MEMORY: (LESS_BITS, LESS_CACHE, LESS_TOKENS),
}
"""Bottleneck -> what a build towards a target (`engine.target`) tries, the lever first: the part that a recipe can pull."""
DECODING = "decode several tokens in a pass: parallel decoding, or speculative with a draft"


def bottleneck_of(
    stages: Sequence, host_ms: float, architecture: Architecture, workload: Workload, recipe: Recipe
) -> tuple[str, str]:
    """(bottleneck, lever) of a plan.

    When one repeated stage takes most of the time, its number of calls comes first: flow steps of the action expert,
    and for tokens what each pass spends its time on, with another way of decoding as the lever.
    """
    spent = {HOST: host_ms}
    for stage in stages:
        for label, ms in stage.spent_ms.items():
            spent[label] = spent.get(label, 0.0) + ms
    total = sum(spent.values())
    for stage in stages:
        if stage.calls > 1 and stage.ms > REPEATED * total:
            if stage.name == "denoise":
                inner = max(stage.spent_ms, key=stage.spent_ms.get)
                return FLOW_STEPS, f"{LEVERS[FLOW_STEPS]}; within a step, {inner}: {LEVERS[inner]}"
            if stage.name == "decode" and workload.decoding == "autoregressive":
                inner = max(stage.spent_ms, key=stage.spent_ms.get)
                return inner, DECODING
    label = max(spent, key=spent.get)
    return label, LEVERS[label]
