"""What an engine has to hold on a recording, in Python or as the YAML file given to --accept."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from pathlib import Path

from vla_edge.types import VlaEdgeError


class LimitsError(VlaEdgeError):
    """A file of limits that cannot be understood."""


@dataclass(frozen=True)
class Limits:
    """None switches a limit off, or takes what follows from the rate where that is said.

    Attributes:
        exchanged_joints: joints that move as another joint should.
        normalization: difference of the engine's statistics from full precision's, in units of the latter's scale.
        state_outside: share of the recorded joint positions that lie far outside the policy's statistics.
        action_error_rel: difference to full precision over the standard deviation of the motion.
        error_over_hold: error against the robot's motion over that of a policy that never moves.
        effector_mm: mean distance of the worst end effector from where full precision puts it.
        rejected_fraction: chunks the controller refuses.
        jerk_ratio: root mean square jerk of the commands over that with full precision.
        latency_p99_ms: of an inference; None for one period of the evaluated rate.
        staleness_p99_ms: age of the oldest observation acted on; None for three periods.
        served_fraction: observations that become chunks, at least.
        skipped_fraction: frames left out, of all that were due.
    """

    exchanged_joints: float | None = 0
    normalization: float | None = 0.001
    state_outside: float | None = 0.02
    action_error_rel: float | None = 0.03
    error_over_hold: float | None = 1.0
    effector_mm: float | None = None
    rejected_fraction: float | None = 0.02
    jerk_ratio: float | None = None
    latency_p99_ms: float | None = None
    staleness_p99_ms: float | None = None
    served_fraction: float | None = 0.95
    skipped_fraction: float | None = 0.05

    @classmethod
    def load(cls, path: str | Path) -> Limits:
        """The attributes above as keys of a YAML mapping; what is left out keeps its default.

        Raises:
            LimitsError: the file cannot be read, or holds a key or a value that means nothing here.
        """
        import yaml

        try:
            plain = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise LimitsError(f"limits {path} cannot be read: {error}; it must be a YAML file") from None
        if not isinstance(plain, dict):
            raise LimitsError(f"limits {path} is a {type(plain).__name__}; it must map figures to limits")
        known = [entry.name for entry in fields(cls)]
        for key, value in plain.items():
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise LimitsError(f"limits {path} has the unknown key {key!r}; did you mean {nearest!r}?")
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (number and value >= 0):
                raise LimitsError(f"limits {path}: {key} is {value!r}; it must be a number from 0 up, or null")
        return cls(**plain)
