"""A convolution's weights -> those of thinner convolutions, best for the inputs it really gets.

What reaches a convolution has a covariance over taps and channels (what factors change of the mean output, a bias mends).
Where that is a product of one over taps and one over channels, the least error at the output is the least error of the
kernel whitened along each dimension, and so both decompositions are of that; then the last convolutions (all but those that
make the inputs fewer) are fitted anew to the whole covariance, by least squares or, through fewer channels, by reduced-rank
regression (Izenman, 1975, doi:10.1016/0047-259X(75)90042-1).

Weights lie as `policy.convolution` has them: (O, *taps, C), the taps of later dimensions outside those of earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from vla_edge.compress.factor.cp import canonical, khatri_rao
from vla_edge.compress.factor.tucker import cheapest_ranks, kept_energy, tucker2
from vla_edge.compress.factor.vbmf import signal_rank
from vla_edge.compress.low_rank import DAMPING, roots
from vla_edge.compress.statistics import output_error

VBMF = "vbmf"
_TRIES = 6  # of ranks until the energy is kept
_CP_STEPS = 16  # shares of the rank that pays, of which one is looked for
_SILENCE = 1e-30  # variance, of what carries nothing
_ROUGH = {"sweeps": 40, "gain": 1e-3}  # of the decompositions that only tell which


class Factors(Protocol):
    """Weights of thinner convolutions.

    Attributes:
        ranks: channels in between.
    """

    ranks: tuple[int, ...]

    def weight(self) -> np.ndarray:
        """(O, taps * C) of the one convolution that they are together."""


@dataclass(frozen=True)
class TuckerFactors:
    """One tap, all taps, one tap.

    Attributes:
        ranks: P and Q.
        inputs: (P, C); None where there are no fewer than C, which then stay as they are.
        core: (Q, taps * P). outputs: (O, Q); None likewise.
    """

    ranks: tuple[int, int]
    inputs: np.ndarray | None
    core: np.ndarray
    outputs: np.ndarray | None

    def weight(self) -> np.ndarray:
        core = self.core
        if self.inputs is not None:
            core = (core.reshape(len(core), -1, len(self.inputs)) @ self.inputs).reshape(len(core), -1)
        return core if self.outputs is None else self.outputs @ core


@dataclass(frozen=True)
class CPFactors:
    """One tap, each dimension's taps for every channel by itself, one tap.

    Attributes:
        inputs: (R, C). taps: (R, k) of each dimension in order. outputs: (O, R).
    """

    inputs: np.ndarray
    taps: tuple[np.ndarray, ...]
    outputs: np.ndarray

    @property
    def ranks(self) -> tuple[int, ...]:
        return (len(self.inputs),)

    def features(self) -> np.ndarray:
        """(R, taps * C): what stands before `outputs`."""
        return khatri_rao([*(taps.T for taps in reversed(self.taps)), self.inputs.T]).T

    def weight(self) -> np.ndarray:
        return self.outputs @ self.features()


@dataclass(frozen=True)
class Kernel:
    """A convolution, as far as its factors go.

    Attributes:
        weight: (O, taps * C). taps, stride: along each dimension.
        covariance: (taps * C, taps * C) of what it sees at a place.
    """

    weight: np.ndarray
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    covariance: np.ndarray

    @property
    def outputs(self) -> int:
        return len(self.weight)

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] // math.prod(self.taps)

    def multiplications(self, method: str | None = None, ranks: tuple = ()) -> int:
        """For each place of the output: of itself, or of factors of these ranks (which may be arrays)."""
        once, steps = math.prod(self.taps), math.prod(self.stride)
        if method is None:
            return once * self.inputs * self.outputs
        first, last = self.inputs * ranks[0] * steps, ranks[-1] * self.outputs
        if method != "cp":  # a side of full rank is no convolution
            first, last = first * (ranks[0] < self.inputs), last * (ranks[1] < self.outputs)
            return first + once * ranks[0] * ranks[1] + last
        for taps, step in zip(self.taps, self.stride):  # places become fewer along one dimension after the other
            steps //= step
            first = first + taps * ranks[0] * steps
        return first + last

    def numbers(self, method: str | None = None, ranks: tuple = ()) -> int:
        """As `multiplications`, to store."""
        return replace(self, stride=(1,) * len(self.taps)).multiplications(method, ranks)

    def energy_kept(self, factors: Factors) -> float:
        """Share of the output's energy over the data, about its mean."""
        whole = output_error(self.weight, self.covariance)
        return 1 - output_error(factors.weight() - self.weight, self.covariance) / max(whole, 1e-300)

    def whitened(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """(O, *taps reversed, C) kernel that errs as the output does, and of each dimension but the first what undoes it."""
        shape = (*reversed(self.taps), self.inputs)
        kernel, undoing = self.weight.reshape(self.outputs, *shape), []
        for axis, size in enumerate(shape, 1):
            before, behind = math.prod(shape[: axis - 1]), math.prod(shape[axis:])
            parts = self.covariance.reshape(before, size, behind, before, size, behind)
            root, inverse = roots(np.einsum("aibajb->ij", parts))
            kernel = np.moveaxis(np.moveaxis(kernel, axis, -1) @ root, -1, axis)
            undoing.append(inverse)
        return kernel, undoing


def shrink_(covariance: np.ndarray, samples: float) -> None:
    """In place towards that of channels which vary alike and apart, the more the fewer samples it is of: the oracle approximating
    shrinkage (Chen et al., 2010, arXiv:0907.4698). What was hardly ever seen is not taken for what never comes."""
    size = len(covariance)
    total, square = float(np.trace(covariance)), float(np.square(covariance).sum())
    spread = (samples + 1 - 2 / size) * (square - total**2 / size)
    share = 1.0 if spread <= 0 else min(1.0, ((1 - 2 / size) * square + total**2) / spread)
    covariance *= 1 - share
    covariance.flat[:: size + 1] += share * total / size


def factors_of(kernel: Kernel, method: str, rank: int | str | None, energy: float | None) -> Factors | None:
    """The factors of `kernel` of a given rank, or the fewest multiplications that keep the `energy`.

    Args:
        method: "svd", which keeps all inputs, "tucker" or "cp". rank: at most this, for tucker on both sides; "vbmf" finds
            both, see `vbmf`.

    Returns:
        None where no factors do that with fewer multiplications than the kernel itself.
    """
    factors = {"svd": _svd, "tucker": _tucker, "cp": _cp}[method](kernel, rank, energy)
    if factors is None or kernel.multiplications(method, factors.ranks) >= kernel.multiplications():
        return None
    return factors


def _svd(kernel: Kernel, rank: int | None, energy: float | None) -> TuckerFactors:
    made = kernel.weight @ kernel.covariance @ kernel.weight.T
    if rank is None:
        values = np.linalg.eigvalsh(made)[::-1]
        rank = int(np.searchsorted(np.cumsum(values) / max(float(values.sum()), 1e-300), energy - 1e-12)) + 1
    rank = min(rank, kernel.outputs)
    core, outputs = _through(kernel.weight, made, rank)
    return TuckerFactors((kernel.inputs, rank), None, core, outputs)


def _tucker(kernel: Kernel, rank: int | str | None, energy: float | None) -> TuckerFactors | None:
    whitened, undoing = kernel.whitened()
    whitened = whitened.reshape(kernel.outputs, -1, kernel.inputs)

    def of(inputs: int, outputs: int) -> TuckerFactors:
        basis = tucker2(whitened, inputs, outputs)[0]
        return _fit_tucker(kernel, math.sqrt(math.prod(kernel.taps)) * basis.T @ undoing[-1], outputs)

    if rank == VBMF:
        plain = kernel.weight.reshape(whitened.shape)
        sides = np.moveaxis(plain, 2, 0).reshape(kernel.inputs, -1), plain.reshape(kernel.outputs, -1)
        return of(*(max(1, signal_rank(side)) for side in sides))
    if rank is not None:
        return of(min(rank, kernel.inputs), min(rank, kernel.outputs))
    kept = kept_energy(whitened)

    def cost(inputs, outputs):
        return kernel.multiplications("tucker", (inputs, outputs))

    return _least(kernel, energy, lambda loss: of(*cheapest_ranks(kept, 1 - loss, cost)))


def _least(kernel: Kernel, energy: float, of: Callable[[float], Factors]) -> Factors | None:
    """Factors that keep the energy and little more: how much the whitened kernel has to lose for that is searched for."""
    loss, enough, too_much, best = max(1 - energy, 1e-9), None, None, None
    for _ in range(_TRIES):
        factors = of(loss)
        if kernel.energy_kept(factors) >= energy:
            enough, best = loss, factors
            loss = 2 * loss if too_much is None else math.sqrt(loss * too_much)
        else:
            too_much = loss
            loss = loss / 2 if enough is None else math.sqrt(loss * enough)
        if loss >= 1:
            break
    return best


def _fit_tucker(kernel: Kernel, inputs: np.ndarray, outputs: int) -> TuckerFactors:
    """The best weights behind `inputs` (P, C) through so many channels: reduced-rank regression.

    Channels in between have a variance of 1, so that they can be rounded alike.
    """
    count, places, outputs = len(inputs), math.prod(kernel.taps), min(outputs, kernel.outputs)
    seen = (kernel.covariance.reshape(-1, kernel.inputs) @ inputs.T).reshape(len(kernel.covariance), places * count)
    own = inputs @ seen.reshape(places, kernel.inputs, -1)  # covariance of what passes
    own = own.reshape(places * count, -1)
    wanted = kernel.weight @ seen
    whole = np.linalg.solve(_damped(own), wanted.T).T
    core, out = _through(whole, whole @ wanted.T, outputs)
    if count == kernel.inputs:
        core, inputs = (core.reshape(len(core), -1, count) @ inputs).reshape(len(core), -1), None
    return TuckerFactors((count, outputs), inputs, core, out)


def _through(weight: np.ndarray, made: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """`weight` (O, n) by way of the `count` channels that hold most of what it makes, whose covariance is `made`: (count, n)
    and (O, count); the weight itself and None where there are no fewer."""
    if count == len(weight):
        return weight, None
    values, vectors = np.linalg.eigh((made + made.T) / 2)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    spread = _spread(values)[:, 0]
    return (vectors / spread).T @ weight, vectors * spread


def _cp(kernel: Kernel, rank: int | None, energy: float | None) -> CPFactors | None:
    whitened, undoing = kernel.whitened()

    def of(rank: int, **options) -> CPFactors:
        factors, _ = canonical(whitened, rank, **options)
        taps = [inverse @ part for inverse, part in zip(undoing[:-1], factors[1:-1])]
        made = CPFactors((undoing[-1] @ factors[-1]).T, tuple(part.T for part in reversed(taps)), factors[0])
        return _fit_cp(kernel, made)

    if rank is not None:
        return of(rank)
    most = kernel.multiplications() / kernel.multiplications("cp", (1,))
    ranks = sorted({max(1, int(most * step / _CP_STEPS)) for step in range(1, _CP_STEPS)})
    low, high = -1, len(ranks)  # too few, and enough
    while high - low > 1:
        middle = (low + high) // 2
        if kernel.energy_kept(of(ranks[middle], **_ROUGH)) >= energy:
            high = middle
        else:
            low = middle
    if high == len(ranks):
        return None
    return max(of(ranks[high]), of(ranks[high], **_ROUGH), key=kernel.energy_kept)


def _fit_cp(kernel: Kernel, factors: CPFactors) -> CPFactors:
    """With the last of them fitted anew, and channels in between of a variance of 1."""
    passed = factors.inputs @ _channels(kernel)
    inputs = factors.inputs / _spread(np.einsum("rc,rc->r", passed, factors.inputs))
    taps = [part / _spread(np.square(part).sum(1)) for part in factors.taps]
    features = CPFactors(inputs, tuple(taps), factors.outputs).features()
    seen = kernel.covariance @ features.T
    scale = _spread(np.einsum("rn,nr->r", features, seen))
    taps[-1], seen = taps[-1] / scale, seen / scale.T
    own = (features / scale) @ seen
    outputs = np.linalg.solve(_damped(own), (kernel.weight @ seen).T).T
    return CPFactors(inputs, tuple(taps), outputs)


def _channels(kernel: Kernel) -> np.ndarray:
    """(C, C) covariance of the channels, mean over the taps."""
    places = math.prod(kernel.taps)
    parts = kernel.covariance.reshape(places, kernel.inputs, places, kernel.inputs)
    return np.einsum("scsd->cd", parts) / places


def _spread(variances: np.ndarray) -> np.ndarray:
    """(R, 1) standard deviations, none of them 0."""
    return np.sqrt(np.maximum(variances, max(1e-12 * float(variances.max()), _SILENCE)))[:, None]


def _damped(covariance: np.ndarray) -> np.ndarray:
    mean = max(float(np.trace(covariance)) / len(covariance), _SILENCE)
    return covariance + 1e-2 * DAMPING * mean * np.eye(len(covariance))
