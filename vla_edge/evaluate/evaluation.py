"""What a replay found: figures to compute with, and the few frames worth looking at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass

import numpy as np

from vla_edge.evaluate.metrics import Interval, Percentiles


@dataclass(frozen=True)
class ErrorSummary:
    """Mean absolute joint error, rad.

    Attributes:
        mean: over all frames, steps and joints.
        interval: bootstrap over stretches of the recording.
        per_joint: joint name -> rad.
        per_step: (T,) rad, one for each point of the horizon.
        values: joint positions compared.
    """

    mean: float
    interval: Interval
    per_joint: Mapping[str, float]
    per_step: tuple[float, ...]
    values: int


@dataclass(frozen=True)
class CompressionSummary:
    """The engine against its full-precision reference: same frames, same noise.

    Attributes:
        error: mean absolute difference, rad.
        relative: that difference over the standard deviation of the reference's motion.
        motion_std: this standard deviation, rad.
        cosine_mean, cosine_min: between the two motions, over frames.
    """

    error: ErrorSummary
    relative: float
    motion_std: float
    cosine_mean: float
    cosine_min: float


@dataclass(frozen=True)
class FrameResult:
    """One evaluated frame.

    Attributes:
        time_s: from the beginning of the bag.
        instruction: what the policy was asked.
        error_rad: mean absolute error against what the robot then did, NaN when the recording does not tell.
        compression_rad: mean absolute difference to the reference, NaN without one.
        jump_rad: largest joint step from the chunk before to this one, NaN where they do not overlap.
        latency_ms: of the inference.
    """

    time_s: float
    instruction: str
    error_rad: float
    compression_rad: float
    jump_rad: float
    latency_ms: float


@dataclass(frozen=True)
class Trace:
    """One chunk beside the truth, for plots. Arrays are (T, J) float32 rad, NaN where unknown."""

    frame: int
    time_s: float
    chunk: np.ndarray
    truth: np.ndarray
    reference: np.ndarray | None


@dataclass(frozen=True)
class Snapshot:
    """A frame worth looking at: its pictures as JPEG bytes by camera."""

    frame: int
    pictures: Mapping[str, bytes]


@dataclass(frozen=True)
class Evaluation:
    """An engine on a bag.

    Attributes:
        bag: name of the recording.
        duration_s: length of the recording.
        rate_hz: frames asked for per second of bag.
        frames: frames evaluated.
        skipped: reason -> frames and messages left out.
        warnings: what had to be repaired in the bag.
        engine, reference: what was evaluated and against what (name, kind, precision, ...).
        joint_names, dt, chunk_size: of the policy.
        action: against the measured motion that followed.
        hold: the same for a policy that stays where it is: what an error has to be measured by.
        command: against the commanded motion, None when the bag has none.
        reference_action: the reference against the measured motion, None without one.
        compression: the engine against the reference, None without one.
        instructions: instruction -> (frames, rad) against the measured motion.
        jump_rad: largest joint step at each chunk boundary.
        latency_ms: of whole inferences; `stage_ms` of their parts.
        results: every evaluated frame.
        traces, snapshots: for the report; not part of `to_dict`.
    """

    bag: str
    duration_s: float
    rate_hz: float | None
    frames: int
    skipped: Mapping[str, int]
    warnings: tuple[str, ...]
    engine: Mapping[str, object]
    reference: Mapping[str, object] | None
    joint_names: tuple[str, ...]
    dt: float
    chunk_size: int
    seed: int
    action: ErrorSummary
    hold: ErrorSummary
    command: ErrorSummary | None
    reference_action: ErrorSummary | None
    compression: CompressionSummary | None
    instructions: Mapping[str, tuple[int, float]]
    jump_rad: Percentiles
    latency_ms: Percentiles
    stage_ms: Mapping[str, Percentiles]
    results: tuple[FrameResult, ...]
    traces: tuple[Trace, ...] = field(default=(), repr=False, compare=False)
    snapshots: tuple[Snapshot, ...] = field(default=(), repr=False, compare=False)

    @property
    def action_mae_rad(self) -> float:
        """Mean absolute error against what the robot then did."""
        return self.action.mean

    def summary(self) -> dict:
        """The few figures that a larger report quotes."""
        out = {
            "frames": self.frames,
            "action_mae_rad": self.action.mean,
            "action_mae_interval": [self.action.interval.low, self.action.interval.high],
            "action_mae_rad_per_joint": dict(self.action.per_joint),
            "hold_mae_rad": self.hold.mean,
            "command_mae_rad": self.command.mean if self.command else None,
            "latency_ms": {key: getattr(self.latency_ms, key) for key in ("p50", "p95", "p99")},
            "skipped": dict(self.skipped),
        }
        if self.compression is not None:
            out["action_error_rel"] = self.compression.relative
            out["compression_mae_rad"] = self.compression.error.mean
        return plain(out)

    def to_dict(self) -> dict:
        """Everything but pictures and traces, in JSON types; what is not known is null."""
        kept = [entry.name for entry in fields(self) if entry.name not in ("traces", "snapshots")]
        out = {name: plain(getattr(self, name)) for name in kept}
        out["instructions"] = {
            text: {"frames": frames, "action_mae_rad": plain(mean)}
            for text, (frames, mean) in self.instructions.items()
        }
        return {"action_mae_rad": plain(self.action.mean), **out}


def plain(value):
    """Dataclasses, mappings, tuples and numpy values -> JSON types; NaN and infinities -> None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, bytes):
        raise TypeError("pictures do not belong into a JSON file")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
