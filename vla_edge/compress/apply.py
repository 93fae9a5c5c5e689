"""Recipe + policy + observations -> the compressed layers, ready for export.

In three passes: what reaches the layers is recorded; channels are rescaled where a recipe gains by it (the policy
computes the same afterwards); ranges of activations are recorded on the rescaled policy, and weights are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vla_edge.compress.calibrate import CalibrationError, watch_inputs
from vla_edge.compress.fold import InputGroup, input_groups, rescale
from vla_edge.compress.plan import plan_smoothing
from vla_edge.compress.quantize.awq import clipped_scales, search_scale
from vla_edge.compress.quantize.gptq import gptq
from vla_edge.compress.quantize.ranges import RangeObserver, calibrate
from vla_edge.compress.quantize.rtn import fitting_group, round_on_grid, round_to_nearest
from vla_edge.compress.quantize.smoothquant import best_smoothing, smoothing_scale
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, QuantizedWeight
from vla_edge.compress.recipe import WEIGHTS, Keep, Quantize, Recipe, Smooth
from vla_edge.compress.statistics import InputStatistics
from vla_edge.types import Observation

Tell = Callable[[float, str], None]


def compress_policy(
    recipe: Recipe,
    plan: Mapping[str, Keep | Quantize],
    modules: Mapping[str, object],
    stages: Sequence,
    runner,
    observations: Sequence[Observation],
    tell: Tell,
    reduce_range: bool = False,
) -> dict[str, CompressedLinear]:
    """What becomes of every layer. Norms and layers of `stages` may be rescaled in place, see `rescales`.

    Args:
        plan: result of `plan_layers`.
        modules: "stage.path" -> `nn.Linear` of `stages`.
        runner: a `Runner` in PyTorch of these `stages`.
        tell: called with the fraction done and what is being done.
        reduce_range: what `reduce_range: auto` means on the machine the engine is for.

    Raises:
        RecipeError: smoothing that contradicts the plan.
        CalibrationError: data that are not finite, or never reach a layer that needs them.
    """
    smoothing = plan_smoothing(recipe, plan)
    groups = input_groups(modules, stages)
    watched = {group.names[0]: group for group in groups if _needs_statistics(group, plan, smoothing)}
    statistics: dict[str, InputStatistics] = {}
    if watched:
        seen = watch_inputs(
            runner, {name: modules[name] for name in watched}, InputStatistics, observations,
            lambda f: tell(0.4 * f, "recording what reaches the layers"),
        )  # fmt: skip
        for number, (name, group) in enumerate(watched.items()):
            tell(0.4 + 0.2 * number / len(watched), "rescaling channels")
            if not seen[name].count:
                raise _never_reached(name)
            scale = _scale(group, plan, smoothing, modules, seen[name], reduce_range)
            if scale is not None:
                rescale(group, modules, scale)
                seen[name] = seen[name].scaled(1 / scale)
            statistics |= dict.fromkeys(group.names, seen[name])
    static = {
        name: modules[name]
        for name, step in plan.items()
        if isinstance(step, Quantize) and step.activations == "int8"
    }
    ranges: dict[str, RangeObserver] = {}
    if static:
        ranges = watch_inputs(runner, static, RangeObserver, observations, lambda f: tell(0.6 + 0.3 * f, "calibrating"))
    tell(0.9, "rounding weights")
    return {
        name: compress_layer(name, module, plan[name], ranges.get(name), statistics.get(name), reduce_range)
        for name, module in modules.items()
    }


def rescales(recipe: Recipe) -> bool:
    """Whether `compress_policy` changes the policy it is given (not what it computes)."""
    return any(isinstance(step, Smooth) or isinstance(step, Quantize) and step.method == "awq" for step in recipe.steps)


def compress_layer(
    name: str,
    module,
    step: Keep | Quantize,
    ranges: RangeObserver | None = None,
    statistics: InputStatistics | None = None,
    reduce_range: bool = False,
) -> CompressedLinear:
    """One `nn.Linear` as its step wants it.

    Args:
        name: "stage.path", for errors.
        ranges, statistics: of the layer's input, where the step needs them.
        reduce_range: what `reduce_range: auto` means on the machine the engine is for.

    Raises:
        CalibrationError: data are needed and did not come.
    """
    weight = module.weight.detach().cpu().float().numpy()
    bias = None if module.bias is None else module.bias.detach().cpu().float().numpy()
    if isinstance(step, Keep):
        return CompressedLinear(weight.astype(_dtype(step.dtype)), bias)
    if step.needs_statistics and statistics is None:
        raise _never_reached(name)
    quantized = _quantize(weight, step, statistics, reduce_range)
    if step.correct_bias:
        lost = (weight - quantized.dequantize()) @ statistics.mean
        bias = lost if bias is None else bias + lost
    return CompressedLinear(quantized, bias, _activation(name, step, ranges))


def _quantize(
    weight: np.ndarray, step: Quantize, statistics: InputStatistics | None, reduce_range: bool
) -> QuantizedWeight:
    bits, reduced = WEIGHTS[step.weights], reduce_range if step.reduce_range == "auto" else step.reduce_range
    if step.method == "rtn":
        return round_to_nearest(weight, bits, step.group_size, reduced)
    group = fitting_group(weight.shape[1], step.group_size) if step.group_size is not None else None
    moment = statistics.second_moment
    scales = clipped_scales(weight, moment, bits, group, reduced)
    if step.method == "awq":
        return round_on_grid(weight, scales, bits, group, reduced)
    return gptq(weight, moment, bits, group, scales, step.damping, step.activation_order, reduced)


def _needs_statistics(group: InputGroup, plan, smoothing) -> bool:
    return any(
        name in smoothing or isinstance(plan[name], Quantize) and plan[name].needs_statistics for name in group.names
    )


def _scale(
    group: InputGroup, plan, smoothing, modules, statistics: InputStatistics, reduce_range: bool
) -> np.ndarray | None:
    """By which to rescale the group's input, None where its layers do not all want that or nothing can be rescaled."""
    if group.producer is None:
        return None
    weights = [modules[name].weight.detach().cpu().float().numpy() for name in group.names]
    steps = {smoothing.get(name) for name in group.names}
    if len(steps) == 1 and None not in steps:
        (step,) = steps
        if step.alpha != "auto":
            return smoothing_scale(statistics, weights, step.alpha)
        return best_smoothing(statistics, weights, reduce_range)[0]
    storage = [plan[name] for name in group.names]
    if all(isinstance(step, Quantize) and step.method == "awq" for step in storage):
        quantizers = [
            lambda weight, step=step: round_to_nearest(weight, WEIGHTS[step.weights], step.group_size)
            for step in storage
        ]
        return search_scale(statistics, weights, quantizers)
    return None


def _activation(name: str, step: Quantize, ranges: RangeObserver | None) -> ActivationQuant | None:
    if step.activations is None:
        return None
    if step.activations == "int8-dynamic":
        return ActivationQuant("dynamic")
    if ranges is None or not np.isfinite(ranges.low):
        raise _never_reached(name)
    return calibrate(ranges, step.calibrator, step.percentile)


def _never_reached(name: str) -> CalibrationError:
    return CalibrationError(f"calibration never reached layer {name}; give observations that make the policy use it")


def _dtype(name: str):
    if name != "bfloat16":
        return name
    import ml_dtypes  # numpy itself has no such type

    return ml_dtypes.bfloat16
