"""Is it good enough, and if not, why: limits applied to figures, each with a sentence a person can act on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vla_edge.evaluate.evaluation import Evaluation


@dataclass(frozen=True)
class Limits:
    """What an engine has to hold on a recording. None switches a limit off.

    Attributes:
        action_error_rel: difference to full precision over the standard deviation of the motion.
        error_over_hold: error against the robot's motion over that of a policy that never moves.
        latency_p99_ms: of an inference; one period of the evaluated rate when None.
        skipped_fraction: frames left out, of all that were due.
    """

    action_error_rel: float | None = 0.03
    error_over_hold: float | None = 1.0
    latency_p99_ms: float | None = None
    skipped_fraction: float | None = 0.05


@dataclass(frozen=True)
class Check:
    """One limit applied to one figure.

    Attributes:
        name: of the figure, as in the JSON files.
        value, limit: in `unit`; NaN where the figure could not be taken, which fails.
        relation: "<=" or ">=", how the value has to stand to the limit.
        passed: whether it does.
        sentence: the same for a person.
    """

    name: str
    value: float
    unit: str
    relation: str
    limit: float
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """All checks of one evaluation."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return all(check.passed for check in self.checks)

    @property
    def headline(self) -> str:
        """The verdict in a few words."""
        failed = [check.name for check in self.checks if not check.passed]
        if not failed:
            return f"Passes {'both' if len(self.checks) == 2 else 'all ' + str(len(self.checks))} limits"
        return f"Fails {len(failed)} of {len(self.checks)} limits"


def check(name: str, value: float, unit: str, relation: str, limit: float, sentence: str) -> Check:
    """Applies one limit; a figure that is not known does not pass."""
    if relation not in ("<=", ">="):
        raise ValueError(f"relation is {relation!r}; it must be <= or >=")
    known = value is not None and math.isfinite(value)
    passed = known and (value <= limit if relation == "<=" else value >= limit)
    return Check(name, float(value) if known else math.nan, unit, relation, float(limit), passed, sentence)


def judge(evaluation: Evaluation, limits: Limits | None = None) -> Verdict:
    """Applies the limits to what a replay found; the limit to full precision only where a reference was given."""
    limits = limits or Limits()
    checks = []
    if limits.action_error_rel is not None and evaluation.compression is not None:
        relative = evaluation.compression.relative
        checks.append(
            check(
                "action_error_rel",
                relative,
                "",
                "<=",
                limits.action_error_rel,
                f"Its actions differ from full precision by {_percent(relative)} of the motion, "
                f"on the same frames from the same noise; {_percent(limits.action_error_rel)} is allowed.",
            )
        )
    if limits.error_over_hold is not None:
        ratio = evaluation.action.mean / evaluation.hold.mean if evaluation.hold.mean else math.nan
        checks.append(
            check(
                "error_over_hold",
                ratio,
                "",
                "<=",
                limits.error_over_hold,
                f"Its error against what the robot did is {ratio:.2f} times that of standing still "
                f"({1e3 * evaluation.action.mean:.1f} against {1e3 * evaluation.hold.mean:.1f} mrad); "
                f"{limits.error_over_hold:g} is allowed.",
            )
        )
    latency_limit = limits.latency_p99_ms
    if latency_limit is None and evaluation.rate_hz:
        latency_limit = 1e3 / evaluation.rate_hz
    if latency_limit is not None:
        checks.append(
            check(
                "latency_p99_ms",
                evaluation.latency_ms.p99,
                "ms",
                "<=",
                latency_limit,
                f"99 of 100 inferences took at most {evaluation.latency_ms.p99:.1f} ms here; "
                f"{latency_limit:.0f} ms are allowed.",
            )
        )
    if limits.skipped_fraction is not None:
        lost = sum(count for reason, count in evaluation.skipped.items() if reason.startswith("frame"))
        fraction = lost / (lost + evaluation.frames)
        checks.append(
            check(
                "skipped_fraction",
                fraction,
                "",
                "<=",
                limits.skipped_fraction,
                f"{lost} of {lost + evaluation.frames} frames could not be evaluated; "
                f"{_percent(limits.skipped_fraction)} may be left out.",
            )
        )
    return Verdict(tuple(checks))


def _percent(value: float) -> str:
    return f"{100 * value:.2g}\u00a0%" if value < 0.1 else f"{100 * value:.0f}\u00a0%"
