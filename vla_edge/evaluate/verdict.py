"""Is it good enough, and if not, why: limits applied to figures, each with a sentence a person can act on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vla_edge.evaluate.evaluation import Evaluation
from vla_edge.evaluate.limits import Limits


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
    """All checks of one evaluation; `noun` says what they are, for the headline."""

    checks: tuple[Check, ...]
    noun: str = "limits"

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return all(check.passed for check in self.checks)

    @property
    def headline(self) -> str:
        """The verdict in a few words."""
        failed = [check.name for check in self.checks if not check.passed]
        if not failed:
            return f"Passes {'both' if len(self.checks) == 2 else 'all ' + str(len(self.checks))} {self.noun}"
        named = f": {', '.join(failed)}" if len(failed) <= 3 else ""
        return f"Fails {len(failed)} of {len(self.checks)} {self.noun}{named}"


def check(name: str, value: float, unit: str, relation: str, limit: float, sentence: str) -> Check:
    """Applies one limit; a figure that is not known does not pass."""
    if relation not in ("<=", ">="):
        raise ValueError(f"relation is {relation!r}; it must be <= or >=")
    known = value is not None and math.isfinite(value)
    passed = known and (value <= limit if relation == "<=" else value >= limit)
    return Check(name, float(value) if known else math.nan, unit, relation, float(limit), passed, sentence)


def judge(evaluation: Evaluation, limits: Limits | None = None) -> Verdict:
    """Applies the limits to what a replay found; those against full precision only where a reference was given.

    Figures that tell what is wrong come before those that only tell that something is.
    """
    chosen, checks = limits or Limits(), []
    for name, relation, figure in _FIGURES:
        limit = getattr(chosen, name)
        found = figure(evaluation, limit)
        if found is not None:
            value, limit, unit, sentence = found
            checks.append(check(name, value, unit, relation, limit, sentence))
    return Verdict(tuple(checks))


# Each takes an evaluation and a limit, and gives value, limit, unit and sentence; None where it does not apply.


def _exchanged(found: Evaluation, limit):
    if limit is None:
        return None
    pairs, against = found.agreement.exchanged, found.agreement.against
    told = ", ".join(f"{a} is {b} of {against}" for a, b in pairs)
    right = f"Every joint moves like its own of {against}."
    sentence = f"{told}: the order of the joints is wrong." if pairs else right
    return len(pairs), limit, "joints", sentence


def _normalization(found: Evaluation, limit):
    agreement = found.agreement
    if limit is None or found.reference is None:
        return None
    if agreement.normalization <= limit:
        sentence = "Its statistics are those of full precision."
    else:
        sentence = (
            f"Its statistics are not those of full precision: {agreement.normalization_at} is off by "
            f"{agreement.normalization:.2g} of its scale. Build the engine again from this checkpoint."
        )
    return agreement.normalization, limit, "", sentence


def _state_outside(found: Evaluation, limit):
    if limit is None:
        return None
    share, at = found.agreement.state_outside, found.agreement.state_outside_at
    where = f", most of them of {at}" if at else ""
    sentence = (
        f"{_percent(share)} of the recorded joint positions lie far outside what the policy's statistics know{where}; "
        f"{_percent(limit)} may."
    )
    return share, limit, "", sentence


def _action_error(found: Evaluation, limit):
    if limit is None or found.compression is None:
        return None
    relative = found.compression.relative
    sentence = (
        f"Its actions differ from full precision by {_percent(relative)} of the motion, on the same frames from the "
        f"same noise; {_percent(limit)} is allowed."
    )
    if relative > limit and found.stage_errors:
        stage, error = max(found.stage_errors.items(), key=lambda entry: entry[1])
        sentence += f" Given the same inputs, stage {stage} is furthest off: {_percent(error)}."
    return relative, limit, "", sentence


def _error_over_hold(found: Evaluation, limit):
    if limit is None:
        return None
    ratio = found.action.mean / found.hold.mean if found.hold.mean else math.nan
    sentence = (
        f"Its error against what the robot did is {ratio:.2f} times that of standing still "
        f"({1e3 * found.action.mean:.1f} against {1e3 * found.hold.mean:.1f} mrad); {limit:g} is allowed."
    )
    return ratio, limit, "", sentence


def _effector(found: Evaluation, limit):
    if limit is None or found.compression is None:
        return None
    if not found.effectors:
        return math.nan, limit, "mm", "Where its end effectors are is not known: no URDF was given."
    link, worst = max(found.effectors.items(), key=lambda entry: entry[1].compression)
    sentence = (
        f"It puts {link} {worst.compression:.1f} mm from where full precision does, on average; {limit:g} mm are "
        "allowed."
    )
    return worst.compression, limit, "mm", sentence


def _rejected(found: Evaluation, limit):
    if limit is None or found.control is None:
        return None
    share, why = found.control.rejected_fraction, ", ".join(f"{n} for {r}" for r, n in found.control.rejected.items())
    sentence = f"The controller refuses {_percent(share)} of its chunks{' (' + why + ')' if why else ''}; "
    return share, limit, "", sentence + f"{_percent(limit)} may be."


def _jerk(found: Evaluation, limit):
    if limit is None or found.reference_control is None:
        return None
    reference = found.reference_control.jerk_rms
    ratio = found.control.jerk_rms / reference if reference else math.nan
    sentence = f"Its commands have {ratio:.2f} times the jerk of full precision's; {limit:g} times is allowed."
    return ratio, limit, "", sentence


def _latency(found: Evaluation, limit):
    limit = 1e3 / found.rate_hz if limit is None and found.rate_hz else limit
    if limit is None:
        return None
    p99 = found.latency_ms.p99
    return p99, limit, "ms", f"99 of 100 inferences took at most {p99:.1f} ms here; {limit:.0f} ms are allowed."


def _staleness(found: Evaluation, limit):
    limit = 3e3 / found.rate_hz if limit is None and found.rate_hz else limit
    if limit is None or not found.serving.staleness_ms.n:
        return None
    p99 = found.serving.staleness_ms.p99
    sentence = f"At these latencies the robot acts on pictures up to {p99:.0f} ms old; {limit:.0f} ms are allowed."
    return p99, limit, "ms", sentence


def _served(found: Evaluation, limit):
    if limit is None or not found.rate_hz:
        return None
    serving = found.serving
    sentence = (
        f"At these latencies {serving.served} of {serving.offered} observations become chunks ({serving.rate_hz:.1f} a "
        f"second); {_percent(limit)} have to."
    )
    return serving.served_fraction, limit, "", sentence


def _skipped(found: Evaluation, limit):
    if limit is None:
        return None
    lost = sum(count for reason, count in found.skipped.items() if reason.startswith("frame"))
    due = lost + found.frames
    return lost / due, limit, "", f"{lost} of {due} frames could not be evaluated; {_percent(limit)} may be left out."


_FIGURES = (
    ("exchanged_joints", "<=", _exchanged),
    ("normalization", "<=", _normalization),
    ("state_outside", "<=", _state_outside),
    ("action_error_rel", "<=", _action_error),
    ("error_over_hold", "<=", _error_over_hold),
    ("effector_mm", "<=", _effector),
    ("rejected_fraction", "<=", _rejected),
    ("jerk_ratio", "<=", _jerk),
    ("latency_p99_ms", "<=", _latency),
    ("staleness_p99_ms", "<=", _staleness),
    ("served_fraction", ">=", _served),
    ("skipped_fraction", "<=", _skipped),
)


def _percent(value: float) -> str:
    if not math.isfinite(value):
        return "an unknown share"
    return f"{100 * value:.2g}\u00a0%" if value < 0.1 else f"{100 * value:.0f}\u00a0%"
