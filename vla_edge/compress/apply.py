"""Recipe + policy + observations -> the compressed layers, ready for export.

What reaches the layers is recorded; weights are pruned and channels rescaled where a recipe says so, in the policy
itself, and rounded; then ranges of activations are recorded on what the policy has become.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from vla_edge.compress.calibrate import Observer, never_reached, watch_inputs
from vla_edge.compress.fold import InputGroup, input_groups, rescale
from vla_edge.compress.low_rank import factorize, saves
from vla_edge.compress.plan import plan_pruning, plan_smoothing
from vla_edge.compress.prune.masks import magnitude_mask, wanda_mask
from vla_edge.compress.prune.sparsegpt import sparsegpt
from vla_edge.compress.quantize.awq import clipped_steps, search_scale
from vla_edge.compress.quantize.formats import INT4, NVFP4_GROUP, Format, number_format
from vla_edge.compress.quantize.gptq import gptq, ordered_factor
from vla_edge.compress.quantize.ranges import RangeObserver, calibrate
from vla_edge.compress.quantize.rtn import fitting_group, round_on_grid, round_to_nearest
from vla_edge.compress.quantize.smoothquant import best_smoothing, smoothing_scale
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, LowRank, QuantizedWeight
from vla_edge.compress.recipe import Recipe
from vla_edge.compress.statistics import InputStatistics, products_size
from vla_edge.compress.steps import CHANNEL, Keep, LowRankStep, Prune, Quantize, Smooth, Storage
from vla_edge.types import Observation

Tell = Callable[[float, str], None]
Weighed = Callable[[Mapping[str, Sequence], Callable[[float], None]], dict[str, InputStatistics]]
"""Of layers that read one tensor, by name, and of progress: `importance.weighed_inputs` of a policy."""

Record = Callable[[Mapping[str, object], Callable[[str], Observer], Callable[[float], None]], dict[str, Observer]]
"""Of layers by name, of what makes an observer of each, and of progress: the observers after all the data."""

_LEAST_PRODUCTS = 128 << 20


def compress_policy(
    recipe: Recipe,
    plan: Mapping[str, Storage],
    modules: Mapping[str, object],
    stages: Sequence,
    runner,
    observations: Sequence[Observation],
    tell: Tell,
    reduce_range: bool = False,
    zeros: Collection[str] = (),
    given: Mapping[str, CompressedLinear] | None = None,
    weighed: Weighed | None = None,
) -> dict[str, CompressedLinear]:
    """What becomes of every layer. `stages` may be changed in place, see `Recipe.changes_policy`.

    Args:
        plan: result of `plan_layers`.
        modules: "stage.path" -> `nn.Linear` of `stages`.
        runner: a `Runner` in PyTorch of these `stages`.
        tell: called with the fraction done and what is being done.
        reduce_range: what `reduce_range: auto` means on the machine the engine is for.
        zeros: layers that were pruned before, whose zeros stay.
        given: layers that somebody else has compressed already.
        weighed: for steps that fit by importance.

    Raises:
        RecipeError: smoothing or pruning that contradicts the plan.
        CalibrationError: data that are not finite, or never reach a layer that needs them.
    """

    def record(watched, observer, progress) -> dict[str, Observer]:
        return watch_inputs(runner, watched, observer, observations, progress)

    smoothing = plan_smoothing(recipe, plan)
    pruning = plan_pruning(recipe, plan, {name: module.in_features for name, module in modules.items()})
    groups = input_groups(modules, stages)
    return compress_layers(
        plan, smoothing, pruning, modules, groups, record, tell, reduce_range, zeros, given, weighed
    )


def compress_layers(
    plan: Mapping[str, Storage],
    smoothing: Mapping[str, Smooth],
    pruning: Mapping[str, Prune],
    modules: Mapping[str, object],
    groups: Sequence[InputGroup],
    record: Record,
    tell: Tell,
    reduce_range: bool = False,
    zeros: Collection[str] = (),
    given: Mapping[str, CompressedLinear] | None = None,
    weighed: Weighed | None = None,
    most_products: int | None = None,
    bfloat16: bool = False,
) -> dict[str, CompressedLinear]:
    """What becomes of `modules`, all layers of a policy or a part that `input_groups` leaves whole.

    Args:
        plan, smoothing, pruning: of at least these layers. groups: of `input_groups`.
        record: shows the data to layers; for the others see `compress_policy`, and what it raises.
        most_products: bytes of products of channels that are held at once; `products_bytes` when None.
        bfloat16: errors that are only compared are found by products in bfloat16.
    """
    done = dict(given or {})
    fixed = {id(modules[name]) for name in done}
    groups = [replace(group, producer=None) if id(group.producer) in fixed else group for group in groups]

    def steps_of(group: InputGroup) -> list:
        names = [name for name in group.names if name not in done]
        found = (part.get(name) for name in names for part in (plan, smoothing, pruning))
        return [step for step in found if step is not None]

    def prune(name: str, statistics: InputStatistics | None) -> None:
        if name in pruning:
            _put(modules[name], prune_weight(_numpy(modules[name].weight), pruning[name], statistics))

    def compressed(name: str, statistics: InputStatistics | None, factors: dict | None = None) -> CompressedLinear:
        stays, scale = name in pruning or name in zeros, scales.get(name)
        return compress_layer(name, modules[name], plan[name], statistics, reduce_range, stays, scale, factors)

    ranges: dict[str, RangeObserver] = {}
    scales: dict[str, np.ndarray] = {}  # by which inputs are divided at run time
    # where it is so, what reaches the layers is what statistics are taken of
    untouched = not pruning and not any(isinstance(step, LowRankStep) for step in plan.values())
    asked = {group: steps_of(group) for group in groups}
    watched = {group: steps for group, steps in asked.items() if any(step.needs_statistics for step in steps)}
    shares = _shares(watched, modules, most_products or products_bytes(modules))
    for number, share in enumerate(shares):

        def part(fraction: float, what: str, number: int = number) -> None:
            tell(0.6 * (number + fraction) / len(shares), what)

        seen = _recorded(share, modules, record, weighed, part, bfloat16)
        for group in share:
            if not seen[group].count:
                raise never_reached(group.names[0])
            for name in group.names:
                prune(name, seen[group])
        for group in share:
            if not done.keys().isdisjoint(group.names):
                continue  # who compressed them has seen what comes as it is
            scale = _scale(group, plan, smoothing, modules, seen[group], reduce_range)
            if scale is None:
                continue
            seen[group] = seen[group].scaled(1 / scale)
            if group.producer is not None:
                rescale(group, modules, scale)
            else:
                scales |= dict.fromkeys(group.names, scale)
        for place, group in enumerate(share):
            part(0.8 + 0.2 * place / len(share), "choosing weights")
            statistics, factors = seen.pop(group), {}
            for name in group.names:
                step = plan[name]
                if name in done:
                    continue
                done[name] = compressed(name, statistics, factors)
                if isinstance(step, LowRankStep):
                    _put(modules[name], done[name].effective_weight())
                elif untouched and isinstance(step, Quantize) and step.calibrator == "minmax":
                    ranges[name] = RangeObserver.spanning(statistics.low.min(), statistics.high.max())
    for name in modules:
        if name not in done:
            prune(name, None)
            done[name] = compressed(name, None)
    static = {
        name: plan[name] for name in modules
        if isinstance(plan[name], Quantize) and plan[name].static_activations and name not in (given or {})
    }  # fmt: skip
    unknown = {name: modules[name] for name in static if name not in ranges}
    if unknown:
        ranges |= record(
            unknown, lambda name: RangeObserver(scales.get(name)), lambda f: tell(0.6 + 0.4 * f, "calibrating")
        )
    for name, step in static.items():
        activation = _activation(name, step, ranges.get(name), modules[name].in_features)
        done[name] = replace(done[name], activation=activation)
    return {name: done[name] for name in modules}


def products_bytes(modules: Mapping[str, object]) -> int:
    """Of products of channels that are held at once: a quarter of the weights, and no less than no computer misses.

    Where there are more, the policy acts on the data several times.
    """
    weights = sum(4 * module.weight.numel() for module in modules.values())
    return max(weights // 4, _LEAST_PRODUCTS)


def _shares(
    watched: Mapping[InputGroup, Sequence], modules: Mapping[str, object], most: int
) -> list[dict[InputGroup, Sequence]]:
    """The groups in the order of the policy, cut where the products of their channels would take over `most` bytes.

    A layer whose outputs are rescaled for its readers is not rounded before: both are in one share.
    """
    shares, held = [], 0
    for group, steps in watched.items():
        columns = modules[group.names[0]].in_features
        size = products_size(columns) if any(step.needs_products for step in steps) else 0
        if not shares or held + size > most:
            shares.append({})
            held = 0
        shares[-1][group] = steps
        held += size
        while any(modules[name] is group.producer for share in shares[:-1] for other in share for name in other.names):
            last = shares.pop()
            shares[-1] |= last
    return shares


def _recorded(
    share: Mapping[InputGroup, Sequence], modules, record: Record, weighed: Weighed | None, part: Tell, bfloat16: bool
) -> dict[InputGroup, InputStatistics]:
    """What reaches each group."""
    first = {group.names[0]: group for group in share}
    important = [
        group for group, steps in share.items() if any(isinstance(step, Quantize) and step.importance for step in steps)
    ]
    rest = [name for name, group in first.items() if group not in important]
    told, cut, seen = "recording what reaches the layers", 0.8 * len(important) / len(share), {}
    if important:
        readers = {group.names[0]: [modules[name] for name in group.names] for group in important}
        seen |= weighed(readers, lambda f: part(cut * f, told))

    def moments(name: str) -> InputStatistics:
        asking = [step for step in share[first[name]] if step.needs_products]
        rounded = bfloat16 and all(isinstance(step, Quantize) and step.compares_only for step in asking)
        return InputStatistics(bool(asking), rounded)

    if rest:
        seen |= record(
            {name: modules[name] for name in rest}, moments, lambda f: part(cut + (0.8 - cut) * f, told)
        )
    return {first[name]: statistics for name, statistics in seen.items()}


def compress_layer(
    name: str,
    module,
    step: Storage,
    statistics: InputStatistics | None = None,
    reduce_range: bool = False,
    pruned: bool = False,
    scale: np.ndarray | None = None,
    factors: dict | None = None,
) -> CompressedLinear:
    """One `nn.Linear` as its step wants it, all but the grid of static activations.

    Args:
        name: "stage.path", for errors.
        statistics: of the layer's input, divided by `scale`, where the step needs them.
        reduce_range: what `reduce_range: auto` means on the machine the engine is for.
        pruned: whether zeros of the weight have to stay.
        scale: (in,) by which the input is divided at run time, and the weight multiplied.
        factors: what layers of the same statistics share of GPTQ, filled here.

    Raises:
        CalibrationError: data are needed and did not come.
    """
    weight = _numpy(module.weight)
    bias = None if module.bias is None else _numpy(module.bias)
    if isinstance(step, Keep):  # in memory that it shares with the module where nothing changes
        return CompressedLinear(weight.astype(_dtype(step.dtype), copy=False), bias)
    if step.needs_statistics and statistics is None:
        raise never_reached(name)
    if isinstance(step, LowRankStep):
        factors = factorize(weight, step.rank, step.energy, statistics.second_moment, step.dtype)
        if saves(weight.shape, factors.rank):
            return CompressedLinear(None, bias, low_rank=factors)
        return CompressedLinear(weight.astype(step.dtype), bias)
    if scale is not None:
        weight = weight * scale
    branch = None
    if step.low_rank:
        branch = factorize(weight, step.low_rank, None, statistics.second_moment, "float16")
    dense = weight if branch is None else weight - branch.dequantize()
    if branch is not None and scale is not None:  # which sees the input as it is
        branch = LowRank((branch.down / scale).astype(branch.down.dtype), branch.up)
    keep = dense != 0 if pruned else None
    quantized = _quantize(dense, step, statistics, reduce_range, keep, {} if factors is None else factors)
    if step.correct_bias:
        lost = (dense - quantized.dequantize()) @ statistics.mean
        bias = lost if bias is None else bias + lost
    activation = None if step.static_activations else _activation(name, step, None, weight.shape[1])
    return CompressedLinear(quantized, bias, activation, branch, None if scale is None else 1 / scale)


def prune_weight(weight: np.ndarray, step: Prune, statistics: InputStatistics | None = None) -> np.ndarray:
    """(out, in) weights with the zeros that `step` asks for."""
    two_of_four = step.pattern == "2:4"
    if step.method == "magnitude":
        return weight * magnitude_mask(weight, step.sparsity, two_of_four)
    if step.method == "wanda":
        return weight * wanda_mask(weight, statistics, step.sparsity, two_of_four)
    return sparsegpt(weight, statistics.moment_by_rows, step.sparsity, two_of_four, step.damping)


def weight_grid(step: Quantize, columns: int, reduce_range: bool = False) -> tuple[Format, int | None]:
    """The grid of a step's weights, and the inputs that share a scale in a layer of `columns` inputs."""
    grid = number_format(step.weights, reduce_range if step.reduce_range == "auto" else bool(step.reduce_range))
    wanted = NVFP4_GROUP if step.weights == "nvfp4" else step.group_size
    return grid, None if wanted in (None, CHANNEL) else fitting_group(columns, wanted)


def _quantize(
    weight: np.ndarray,
    step: Quantize,
    statistics: InputStatistics | None,
    reduce_range: bool,
    keep: np.ndarray | None,
    factors: dict,
) -> QuantizedWeight:
    grid, group = weight_grid(step, weight.shape[1], reduce_range)
    if step.method == "rtn":
        return round_to_nearest(weight, grid, group)
    moment = statistics.moment_by_rows
    steps = clipped_steps(weight, moment, grid, group)
    if step.method == "awq":
        return round_on_grid(weight, steps, grid, group)
    asked = step.damping, step.activation_order
    if asked not in factors:
        factors[asked] = ordered_factor(moment, *asked)
    return gptq(weight, moment, grid, group, steps, *asked, keep, factors[asked])


def _scale(
    group: InputGroup, plan, smoothing, modules, statistics: InputStatistics, reduce_range: bool
) -> np.ndarray | None:
    """By which to rescale the group's input, None where its layers do not all want that or nothing can be rescaled."""
    weights = [_numpy(modules[name].weight) for name in group.names]
    storage = [plan[name] for name in group.names]

    def quantizers() -> list:
        grids = [weight_grid(step, weight.shape[1], reduce_range) for step, weight in zip(storage, weights)]
        return [lambda weight, grid=grid, size=size: round_to_nearest(weight, grid, size) for grid, size in grids]

    steps = {smoothing.get(name) for name in group.names}
    if len(steps) == 1 and None not in steps:
        (step,) = steps
        if group.producer is None and not step.at_run_time:
            return None
        if step.alpha != "auto":
            return smoothing_scale(statistics, weights, step.alpha)
        if storage[0].activations == "int4-dynamic":
            size = fitting_group(weights[0].shape[1], storage[0].group_size)
            return best_smoothing(statistics, weights, quantizers(), round(2 * INT4.largest), size)[0]
        return best_smoothing(statistics, weights, quantizers())[0]
    if all(isinstance(step, Quantize) and step.scales_channels for step in storage):
        if group.producer is None and not all(step.at_run_time for step in storage):
            return None
        return search_scale(statistics, weights, quantizers())
    return None


def _activation(name: str, step: Quantize, ranges: RangeObserver | None, columns: int) -> ActivationQuant | None:
    if step.activations is None:
        return None
    if step.activations == "int8-dynamic":
        return ActivationQuant("dynamic")
    if step.activations == "int4-dynamic":
        return ActivationQuant("dynamic", format="int4", group_size=fitting_group(columns, step.group_size))
    if ranges is None or not np.isfinite(ranges.low):
        raise never_reached(name)
    return calibrate(ranges, step.calibrator, step.percentile, step.activations)


def _numpy(tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def _put(module, weight: np.ndarray) -> None:
    import torch

    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))


def _dtype(name: str):
    if name != "bfloat16":
        return name
    import ml_dtypes  # numpy itself has no such type

    return ml_dtypes.bfloat16
