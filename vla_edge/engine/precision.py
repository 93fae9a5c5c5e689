"""What a recipe makes of a layer, as far as its time and its bytes go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vla_edge.compress.plan import plan_layers
from vla_edge.compress.quantize.formats import NVFP4_GROUP
from vla_edge.compress.quantize.rtn import fitting_group
from vla_edge.compress.recipe import Recipe, RecipeError
from vla_edge.compress.steps import (
    CHANNEL,
    FewSteps,
    FixedPoint,
    FlowSteps,
    Keep,
    KVCache,
    LowRankStep,
    PruneTokens,
    Quantize,
    Shrink,
    Speculate,
    Storage,
    factors_convolutions,
)

FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class LayerPrecision:
    """How a layer is stored and multiplied.

    Attributes:
        weights: "float32", "float16", "bfloat16", "int8", "int4", "fp8" or "nvfp4".
        inputs: None where they stay floats; "int8", "int8-dynamic", "fp8" or "int4-dynamic".
        group: inputs per scale, None for one scale per output.
        rank: of two float factors that take the layer's place, or of the branch beside it; 0 without.
        whole: whether there is anything but the factors.
    """

    weights: str
    inputs: str | None = None
    group: int | None = None
    rank: int = 0
    whole: bool = True

    def nbytes(self, inputs: int, outputs: int) -> int:
        """Of the weights with their scales, as `compress.quantize.weights` stores them, without a bias."""
        count, total = inputs * outputs, 0
        if self.rank:
            total += self.rank * (inputs + outputs) * FLOAT_BYTES[self.weights if not self.whole else "float16"]
        if not self.whole:
            return total
        if self.weights in FLOAT_BYTES:
            return total + count * FLOAT_BYTES[self.weights]
        total += count // 2 if self.weights in ("int4", "nvfp4") else count
        if self.weights == "nvfp4":
            return total + count // NVFP4_GROUP + 4
        if self.group is None:
            return total + 4 * outputs
        return total + 2 * outputs * self.groups(inputs)

    def groups(self, inputs: int) -> int:
        """Scales of one output."""
        return 1 if self.group is None else inputs // fitting_group(inputs, self.group)

    def flops(self, rows: int, inputs: int, outputs: int) -> int:
        """Of the product on `rows` rows, with its factors."""
        return 2 * rows * (inputs * outputs * self.whole + self.rank * (inputs + outputs))

    def computes(self, floats: str) -> str:
        """Type the product is done in, where `floats` is what a device multiplies floats in.

        Weights kept in float32 ask for float32 products; weights stored in fewer bits leave the device its own.
        """
        if self.inputs is not None:
            return self.inputs.partition("-")[0]
        return "float32" if self.weights == "float32" else floats


def layer_precisions(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]], group: int | None = None
) -> dict[str, LayerPrecision]:
    """Layer -> what `recipe` makes of it.

    Args:
        shapes: layer -> (inputs, outputs). group: for 4-bit weights, instead of the recipe's.

    Raises:
        RecipeError: it does not fit these layers, or does what shapes alone do not tell.
    """
    if any(isinstance(step, Shrink) for step in recipe.steps):
        raise RecipeError(
            f"recipe {recipe.name} takes channels out, and which depends on the data; plan the checkpoint that comes "
            "of it"
        )
    if any(map(factors_convolutions, recipe.steps)):
        raise RecipeError(
            f"recipe {recipe.name} puts factors in the place of convolutions where they are faster, which shapes do not "
            "tell; leave that step out to plan with"
        )
    plan = plan_layers(recipe, list(shapes))
    return {name: _precision(recipe, step, shapes[name], group) for name, step in plan.items()}


def asked_of_workload(recipe: Recipe) -> dict[str, float | str | int]:
    """What the recipe makes of an inference, by the fields of `Workload`: flow steps, share of the image tokens, cache of keys
    and values."""
    found: dict[str, float | str | int] = {}
    for step in recipe.steps:
        if isinstance(step, FewSteps):
            found["steps"] = step.num_steps
        elif isinstance(step, FlowSteps):
            found["steps"] = step.calls
        elif isinstance(step, FixedPoint):
            found |= {"decoding": "fixed-point"} | ({"iterations": step.most_passes} if step.most_passes else {})
        elif isinstance(step, Speculate) and step.draft != "none":
            drafter = "history" if step.draft == "history" else "block"
            found |= {"decoding": "speculative", "drafter": drafter} | ({"draft": step.tokens} if step.tokens else {})
        elif isinstance(step, PruneTokens):
            found |= {"keep_vision": step.keep, "keep_after": step.after}
        elif isinstance(step, KVCache):
            found["kv"] = f"int{step.bits}"
    return found


def _factors(step: LowRankStep, inputs: int, outputs: int) -> LayerPrecision:
    """Factors where they are fewer numbers; other layers stay whole."""
    smaller = step.rank * (inputs + outputs) < inputs * outputs
    return LayerPrecision(step.dtype, rank=step.rank, whole=False) if smaller else LayerPrecision(step.dtype)


def _precision(recipe: Recipe, step: Storage, shape: tuple[int, int], group: int | None) -> LayerPrecision:
    if isinstance(step, Keep):
        return LayerPrecision(step.dtype)
    if isinstance(step, LowRankStep):
        if step.rank is None:
            raise RecipeError(
                f"recipe {recipe.name} finds ranks by energy, which shapes do not tell; give a rank to plan with"
            )
        return _factors(step, *shape)
    assert isinstance(step, Quantize)
    grouped = None if step.group_size in (None, CHANNEL) else step.group_size
    precision = LayerPrecision(step.weights, step.activations, grouped, step.low_rank)
    return replace(precision, group=group) if group and step.weights == "int4" and grouped else precision
