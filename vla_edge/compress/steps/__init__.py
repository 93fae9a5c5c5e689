"""The steps a recipe can have: what each is about, and which values it takes.

`check` raises ValueError; which step of which recipe it was is for `recipe` to say.
"""

from vla_edge.compress.steps.inference import (
    FixedPoint,
    FlowSteps,
    KVCache,
    PrefillBlocks,
    PruneTokens,
    Speculate,
    VisionCacheStep,
)
from vla_edge.compress.steps.layers import (
    CHANNEL,
    Keep,
    LowRankStep,
    Prune,
    Quantize,
    Smooth,
    factors_convolutions,
)
from vla_edge.compress.steps.training import FewSteps, Finetune, Shrink

STEPS = {
    step.key: step
    for step in (
        Keep, Smooth, Prune, LowRankStep, Quantize, Shrink, PruneTokens, FlowSteps, VisionCacheStep, FixedPoint, Speculate,
        PrefillBlocks, Finetune, FewSteps, KVCache,
    )  # fmt: skip
}
Decoding = FixedPoint | Speculate | PrefillBlocks
"""What says how a prompt is read and tokens are written."""
Storage = Keep | LowRankStep | Quantize
"""What says how a layer is stored; the other steps prepare it."""
Training = Finetune | FewSteps

__all__ = [
    "CHANNEL", "STEPS", "Decoding", "FewSteps", "Finetune", "FixedPoint", "FlowSteps", "KVCache", "Keep", "LowRankStep",
    "PrefillBlocks", "Prune", "PruneTokens", "Quantize", "Shrink", "Smooth", "Speculate", "Storage", "Training",
    "VisionCacheStep", "factors_convolutions",
]
