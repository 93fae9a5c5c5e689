"""Convolutions of a policy become thinner ones, one after the other, where that is faster.

A convolution whose factors do not pay stays as it was, its weights too: factors that are multiplied together again would
take as long and err.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vla_edge.compress.apply import Tell, products_bytes
from vla_edge.compress.calibrate import never_reached, watch_inputs
from vla_edge.compress.factor.kernels import CPFactors, Factors, Kernel, factors_of, shrink_
from vla_edge.compress.plan import matches
from vla_edge.compress.statistics import InputStatistics, products_size
from vla_edge.compress.steps import LowRankStep
from vla_edge.types import Observation

# Of the time that a convolution takes: what is gained by less is noise, and costs accuracy.
WORTH = 0.95

Race = Callable[[str, object, object, tuple[int, ...]], float]
"""Of the name of a layer, its `Convolution`, the `FactoredConvolution`, and the size (without channels) of what they are
given: the time of the factors over that of the convolution, in the precision that they will have."""


@dataclass(frozen=True)
class FactoredLayer:
    """What became of a convolution.

    Attributes:
        method: "svd", "tucker" or "cp". separate: whether its factors have taken its place; otherwise it is as it was.
        ranks: of the factors; empty where none keep the energy with fewer multiplications.
        energy: share of the output's energy over the data, about its mean, that factors keep. error: of the output,
            relative L2 about the mean.
        weight_error: of the weights, relative Frobenius norm.
        multiplications, numbers: of the factors over those of the convolution.
        time: likewise, as it was measured; None where it was not.
    """

    method: str
    separate: bool
    ranks: tuple[int, ...] = ()
    energy: float = 1.0
    error: float = 0.0
    weight_error: float = 0.0
    multiplications: float = 1.0
    numbers: float = 1.0
    time: float | None = None

    def to_dict(self) -> dict:
        """Plain types, for the manifest."""
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return {**rounded, "ranks": list(self.ranks)}


def factor_convolutions(
    step: LowRankStep,
    policy,
    runner,
    observations: Sequence[Observation],
    tell: Tell,
    race: Race | None = None,
) -> dict[str, FactoredLayer]:
    """Put factors in the place of convolutions of `policy`, in place; returns what became of each that the step means.

    Each is fitted to what reaches it after those before it, as far as they are not looked at together.

    Args:
        runner: a `Runner` in PyTorch of this `policy`. tell: called with the fraction done and what is being done.
        race: None where nothing can be measured; then fewer multiplications decide.

    Raises:
        CalibrationError: data never reach a convolution, or are not finite.
    """
    stages = policy.stages()
    chosen = {name: module for name, module in factorable(stages).items() if meant(step, name)}
    found: dict[str, FactoredLayer] = {}
    for share in _shares(chosen):
        done, part = len(found) / len(chosen), len(share) / len(chosen)
        seen, sizes = _recorded(
            {name: chosen[name] for name in share}, runner, observations,
            lambda f, done=done, part=part: tell(done + 0.5 * part * f, "recording what reaches convolutions"),
        )  # fmt: skip
        for place, name in enumerate(share):
            tell(done + part * (0.5 + 0.5 * place / len(share)), f"factoring {name}")
            statistics, convolution = seen.pop(name), chosen[name]
            kernel = _kernel(convolution, statistics)
            factors = factors_of(kernel, step.method, step.rank, step.energy)
            module = None if factors is None else module_of(factors, convolution, statistics.mean.astype(np.float64))
            found[name] = _decided(step, name, kernel, factors, module, convolution, sizes[name], race)
            if found[name].separate:
                put_factors(stages, name, module)
    return found


def factorable(stages) -> dict:
    """ "stage.path" of its layer -> each `Convolution` of more than one tap that is no factor of another."""
    from vla_edge.engine.trace import convolutions_in
    from vla_edge.policy.convolution import FactoredConvolution

    found = {}
    for stage in (stage for stage in stages if stage.shares is None):
        factored = [name for name, module in stage.module.named_modules() if isinstance(module, FactoredConvolution)]
        for name, module in convolutions_in(stage).items():
            if max(module.kernel) > 1 and not any(name.startswith(f"{whole}.") for whole in factored):
                found[f"{stage.name}.{name}"] = module
    return found


def meant(step: LowRankStep, name: str) -> bool:
    """Whether a layer is among the step's targets."""
    return any(matches(target, name) for target in step.targets)


def module_of(factors: Factors, convolution, mean: np.ndarray):
    """A `FactoredConvolution` that takes the place of `convolution`.

    Args:
        mean: (taps * C,) of what it sees; the bias takes over what factors change of the output there.
    """
    import torch
    from torch import nn

    from vla_edge.policy.convolution import Convolution, DepthwiseConvolution, FactoredConvolution

    kernel, stride, padding = convolution.kernel, convolution.stride, convolution.padding
    one, axes = (1,) * len(kernel), range(len(kernel))

    def dense(weight: np.ndarray, *shape) -> Convolution:
        taps = shape[0] if shape else one
        made = Convolution(weight.shape[1] // int(np.prod(taps)), len(weight), *(shape or (one,)), bias=False)
        made.linear.weight.data.copy_(torch.from_numpy(weight))
        return made

    def along(axis: int, taps: np.ndarray) -> DepthwiseConvolution:
        shape = [tuple(of[i] if i == axis else plain for i in axes) for of, plain in ((kernel, 1), (stride, 1), (padding, 0))]
        made = DepthwiseConvolution(len(taps), *shape)
        made.weight.data.copy_(torch.from_numpy(taps).reshape(made.weight.shape))
        return made

    if isinstance(factors, CPFactors):
        middle = [along(axis, taps) for axis, taps in enumerate(factors.taps)]
    else:
        middle = [dense(factors.core, kernel, stride, padding)]
    ends = [None if weight is None else dense(weight) for weight in (factors.inputs, factors.outputs)]
    parts = [part for part in (ends[0], *middle, ends[1]) if part is not None]
    lost = torch.from_numpy((convolution.linear.weight.detach().double().numpy() - factors.weight()) @ mean).float()
    bias = convolution.linear.bias
    parts[-1].linear.bias = nn.Parameter(lost if bias is None else bias.detach() + lost)
    return FactoredConvolution(*parts).train(convolution.training)


def _decided(
    step: LowRankStep, name: str, kernel: Kernel, factors: Factors | None, module, convolution, size, race: Race | None
) -> FactoredLayer:
    if factors is None:
        return FactoredLayer(step.method, False)
    energy, whole = kernel.energy_kept(factors), np.linalg.norm(kernel.weight)
    multiplications = kernel.multiplications(step.method, factors.ranks) / kernel.multiplications()
    numbers = kernel.numbers(step.method, factors.ranks) / kernel.numbers()
    time = race(name, convolution, module, size) if race and step.separate_where == "faster" else None
    if step.separate_where == "smaller":
        separate = numbers < 1
    else:
        separate = multiplications < 1 if time is None else time < WORTH
    return FactoredLayer(
        step.method, separate, factors.ranks, energy, float(np.sqrt(max(0.0, 1 - energy))),
        float(np.linalg.norm(factors.weight() - kernel.weight) / (whole or 1.0)), multiplications, numbers, time,
    )  # fmt: skip


def _shares(chosen: Mapping[str, object]) -> list[list[str]]:
    """Names in order, cut where the products of their channels would take more memory than they may."""
    most = products_bytes({name: module.linear for name, module in chosen.items()})
    shares, held = [], 0
    for name, module in chosen.items():
        size = products_size(module.linear.in_features)
        if not shares or held + size > most:
            shares.append([])
            held = 0
        shares[-1].append(name)
        held += size
    return shares


def _recorded(
    convolutions: Mapping[str, object], runner, observations, progress
) -> tuple[dict[str, InputStatistics], dict[str, tuple[int, ...]]]:
    """What the convolutions see at each place, and the size, without channels, of what they are given."""
    sizes: dict[str, tuple[int, ...]] = {}

    def notes(name: str):
        def hook(_module, inputs) -> None:
            sizes[name] = tuple(inputs[0].shape[1:-1])

        return hook

    hooks = [module.register_forward_pre_hook(notes(name)) for name, module in convolutions.items()]
    layers = {name: module.linear for name, module in convolutions.items()}
    try:
        seen = watch_inputs(runner, layers, lambda _: InputStatistics(), observations, progress)
    finally:
        for hook in hooks:
            hook.remove()
    for name, statistics in seen.items():
        if not statistics.count:
            raise never_reached(name)
    return seen, sizes


def _kernel(convolution, statistics: InputStatistics) -> Kernel:
    covariance, mean = statistics.second_moment.astype(np.float64), statistics.mean.astype(np.float64)
    covariance -= np.outer(mean, mean)
    # neighbouring places see most of the same
    shrink_(covariance, statistics.count / np.prod(convolution.kernel))
    weight = convolution.linear.weight.detach().double().numpy()
    return Kernel(weight, convolution.kernel, convolution.stride, covariance)


def put_factors(stages, name: str, module) -> None:
    """`module` in the place of the `Convolution` whose layer is `name`."""
    stage = next(stage for stage in stages if name.startswith(f"{stage.name}."))
    parent, _, leaf = name.removeprefix(f"{stage.name}.").removesuffix(".linear").rpartition(".")
    setattr(stage.module.get_submodule(parent), leaf, module)
