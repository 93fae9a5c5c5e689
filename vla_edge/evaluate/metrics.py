"""How far off, how sure, how late: the figures an evaluation is made of. numpy only, every one deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from vla_edge.types import NANOSECONDS, ActionChunk

_SHARE = 1 << 20


@dataclass(frozen=True)
class Interval:
    """A confidence interval around an estimate."""

    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True)
class Percentiles:
    """A distribution in five numbers, in the unit of what went in; NaN when nothing did."""

    n: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Linear interpolation between order statistics, as numpy and R's type 7."""
        data = np.asarray(values, np.float64)
        if not data.size:
            return cls(0, *[math.nan] * 5)
        p50, p95, p99 = np.percentile(data, (50, 95, 99))
        return cls(int(data.size), float(data.mean()), float(p50), float(p95), float(p99), float(data.max()))


class ErrorTable:
    """Mean absolute error over frames, for every step of the horizon and every joint, without keeping the frames.

    Args:
        steps: T, points of a chunk.
        joints: J.
    """

    def __init__(self, steps: int, joints: int):
        self._sum = np.zeros((steps, joints))
        self._count = np.zeros((steps, joints), np.int64)

    def add(self, error: np.ndarray) -> tuple[float, int]:
        """Adds one frame's (T, J) errors, NaN where nothing is known; returns their mean absolute value and number."""
        known = np.isfinite(error)
        magnitude = np.where(known, np.abs(error), 0.0)
        self._sum += magnitude
        self._count += known
        return _ratio(magnitude.sum(), known.sum()), int(known.sum())

    @property
    def count(self) -> int:
        """Known errors so far."""
        return int(self._count.sum())

    def mean(self) -> float:
        """Over everything, rad."""
        return _ratio(self._sum.sum(), self._count.sum())

    def per_joint(self) -> tuple[float, ...]:
        """(J,) rad."""
        return tuple(_ratio(s, n) for s, n in zip(self._sum.sum(axis=0), self._count.sum(axis=0)))

    def per_step(self) -> tuple[float, ...]:
        """(T,) rad: the drift over the horizon."""
        return tuple(_ratio(s, n) for s, n in zip(self._sum.sum(axis=1), self._count.sum(axis=1)))


class MotionScale:
    """Standard deviation of the motion, that is of chunk positions minus the position at the observation.

    Errors are put in relation to this, never to the spread of absolute positions, which mostly tells how the arms hang.
    """

    def __init__(self):
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, positions: np.ndarray, current: np.ndarray) -> None:
        """One frame: (T, J) targets and (J,) positions, rad. Chan's update, so that order and offset do not matter."""
        motion = (positions - current).ravel()
        count, mean = motion.size, float(motion.mean())
        delta, total = mean - self._mean, self._count + count
        self._squares += float(((motion - mean) ** 2).sum()) + delta**2 * self._count * count / total
        self._mean += delta * count / total
        self._count = total

    def std(self) -> float:
        """rad, over all frames, steps and joints."""
        return math.sqrt(self._squares / self._count) if self._count else math.nan


def chunk_stamps(chunk: ActionChunk) -> np.ndarray:
    """(T,) int64 ns: the time of each target."""
    steps = np.arange(1, len(chunk.positions) + 1, dtype=np.float64)
    return chunk.stamp_ns + np.rint(steps * chunk.dt * NANOSECONDS).astype(np.int64)


def boundary_jump(previous: ActionChunk, current: ActionChunk) -> np.ndarray | None:
    """(J,) rad: how far the new chunk's first target is from what the old chunk planned for that moment.

    None when the old chunk had run out by then: there is no boundary to jump at.
    """
    at = int(chunk_stamps(current)[0])
    stamps = chunk_stamps(previous)
    if not stamps[0] <= at <= stamps[-1]:
        return None
    order = [previous.joint_names.index(name) for name in current.joint_names]
    seconds = (stamps - stamps[0]) / NANOSECONDS
    planned = [np.interp((at - stamps[0]) / NANOSECONDS, seconds, previous.positions[:, j]) for j in order]
    return np.abs(current.positions[0] - planned)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine between two arrays taken as vectors; 1 when both are zero, 0 when one is."""
    return likeness(a, b)[0]


def likeness(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """`cosine` of two arrays, and the relative L2 distance |found - expected| / |expected|, not divided where that is 0.

    In float64, of which little is in memory at a time: a 7B policy's keys are 40 million numbers.
    """
    found, expected = np.ravel(found), np.ravel(expected)
    sums = np.zeros(4)  # found^2, expected^2, found * expected, (found - expected)^2
    for begin in range(0, max(found.size, expected.size), _SHARE):  # sizes that differ are an error
        a, b = (part[begin : begin + _SHARE].astype(np.float64) for part in (found, expected))
        sums += a @ a, b @ b, a @ b, np.square(a - b).sum()
    own, other = math.sqrt(sums[0]), math.sqrt(sums[1])
    alike = float(np.clip(sums[2] / own / other, -1.0, 1.0)) if own and other else float(own == other)
    return alike, math.sqrt(sums[3]) / (other or 1.0)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation (1904), ties at their mean rank; NaN when one of them is constant."""
    ranks = []
    for values in (a, b):
        _, place, count = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place] if count.size else np.zeros(0))
    deviations = [rank - rank.mean() if rank.size else rank for rank in ranks]
    norm = math.sqrt(float((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float(deviations[0] @ deviations[1]) / norm if norm else math.nan


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Interval of a success rate (Wilson, 1927): honest at 0 and at 1, where the textbook one has no width.

    Raises:
        ValueError: not 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n} trials cannot be")
    if n == 0:
        return Interval(0.0, 1.0, confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At the ends the bound is exactly 0 or 1; rounding must not put it a hair beyond or short of it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high, confidence)


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron, 1979), the same on every run.

    Args:
        values: the observations.
        groups: label of each observation; whole groups are drawn. Neighbouring frames of a recording are nearly
            copies of each other: drawing them one by one would promise far more certainty than there is.
        weights: the estimate is the weighted mean; all alike when None.
    """
    data = np.asarray(values, np.float64)
    if not data.size:
        return Interval(math.nan, math.nan, confidence)
    labels = np.arange(data.size) if groups is None else np.asarray(groups)
    share = np.ones(data.size) if weights is None else np.asarray(weights, np.float64)
    return bootstrap_intervals((data * share)[:, None], share[:, None], labels, resamples, confidence, seed)[0]


def bootstrap_intervals(
    sums: np.ndarray,
    sizes: np.ndarray,
    groups: Sequence[int],
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Interval, ...]:
    """`bootstrap_interval` of C means at once, from the same draws.

    Args:
        sums, sizes: (N, C) total of each observation, and what it is a total of; the estimates are sums over sizes.
        groups: (N,) labels; whole groups are drawn.
    """
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    count = int(member.max()) + 1 if member.size else 0
    totals, weights = (np.zeros((count, np.shape(sums)[1])) for _ in range(2))
    np.add.at(totals, member, sums)
    np.add.at(weights, member, sizes)
    estimates = np.full((resamples, totals.shape[1]), np.nan)
    rng = np.random.default_rng(seed)
    # A few draws at a time: memory must not grow with the length of the recording.
    rows = max(1, min(resamples, 200_000 // max(count, 1)))
    for start in range(0, resamples if count else 0, rows):
        drawn = rng.integers(0, count, (min(rows, resamples - start), count))
        drawn += count * np.arange(len(drawn))[:, None]
        times = np.bincount(drawn.ravel(), minlength=len(drawn) * count).reshape(len(drawn), count)
        with np.errstate(divide="ignore", invalid="ignore"):
            estimates[start : start + rows] = (times @ totals) / (times @ weights)
    tail = (1 - confidence) / 2
    found = []
    for column in estimates.T:
        known = column[np.isfinite(column)]
        bounds = np.quantile(known, (tail, 1 - tail)) if known.size else (math.nan, math.nan)
        found.append(Interval(float(bounds[0]), float(bounds[1]), confidence))
    return tuple(found)


@dataclass(frozen=True)
class PairedTest:
    """Two policies on the same seeds.

    Attributes:
        only_first, only_second: seeds where exactly one of them succeeded.
        both, neither: seeds where they agree.
        p_value: exact two-sided McNemar test.
        difference: success rate of the second minus that of the first.
    """

    only_first: int
    only_second: int
    both: int
    neither: int
    p_value: float
    difference: float

    @property
    def n(self) -> int:
        """Seeds."""
        return self.only_first + self.only_second + self.both + self.neither

    def drop_bound(self, confidence: float = 0.95) -> float:
        """What the first's success rate exceeds the second's by at most, one-sided; of the normal approximation to the
        difference of paired rates, with half a pair added to each side where they differ."""
        if not self.n:
            return math.nan
        first, second = self.only_first + 0.5, self.only_second + 0.5
        spread = math.sqrt(first + second - (first - second) ** 2 / self.n) / self.n
        return -self.difference + NormalDist().inv_cdf(confidence) * spread


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Exact McNemar test (1947): among the seeds where the two differ, is the coin fair?

    Raises:
        ValueError: the two are not of one length.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} results are not pairs")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_a + only_b
    tail, ways = 0, 1
    for k in range(min(only_a, only_b) + 1):
        tail, ways = tail + ways, ways * (discordant - k) // (k + 1)
    p_value = min(1.0, 2 * tail / 2**discordant)
    both, neither = int((a & b).sum()), int((~a & ~b).sum())
    return PairedTest(only_a, only_b, both, neither, p_value, _ratio(only_b - only_a, a.size))


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else math.nan
