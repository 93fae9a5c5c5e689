"""What a replay found: figures to compute with, and the few frames worth looking at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass

import numpy as np

from vla_edge.evaluate.agreement import Agreement
from vla_edge.evaluate.control_replay import ControlSummary
from vla_edge.evaluate.metrics import Interval, Percentiles
from vla_edge.evaluate.serving import ServingSummary


@dataclass(frozen=True)
class ErrorSummary:
    """Mean absolute joint error, rad.

    Attributes:
        mean: over all frames, steps and joints.
        interval: bootstrap over stretches of the recording.
        per_joint: joint name -> rad. joint_intervals: joint name -> its bootstrap interval.
        per_step: (T,) rad, one for each point of the horizon.
        values: joint positions compared.
    """

    mean: float
    interval: Interval
    per_joint: Mapping[str, float]
    joint_intervals: Mapping[str, Interval]
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
class GroupSummary:
    """The frames of one instruction, or of one phase of the motion; rad, NaN where nothing is known.

    Attributes:
        frames: evaluated.
        action: mean absolute error against the measured motion. interval: of it, by bootstrap.
        compression: mean absolute difference to the reference.
    """

    frames: int
    action: float
    interval: Interval
    compression: float


@dataclass(frozen=True)
class EffectorSummary:
    """Distances at one end effector, mm; NaN where nothing is known.

    Attributes:
        action: from where the chunk puts it to where the robot had it then. interval: of it, by bootstrap.
        compression: from where the reference's chunk puts it.
        per_step: (T,) of `action`.
    """

    action: float
    interval: Interval
    compression: float
    per_step: tuple[float, ...]


@dataclass(frozen=True)
class DisagreementSummary:
    """How far chunks from other noise lie apart, on the same observation: large where the policy is unsure.

    Attributes:
        samples: chunks compared at each frame.
        rad: of single frames, standard deviation over samples, mean over steps and joints.
        relative: its mean over the standard deviation of the motion.
        rank_correlation: Spearman's, with the frame's error; near 1 means that it tells which frames to distrust.
        top_tenth_error_ratio: error of the tenth of the frames with the largest disagreement, over that of the rest.
    """

    samples: int
    rad: Percentiles
    relative: float
    rank_correlation: float
    top_tenth_error_ratio: float


@dataclass(frozen=True)
class FrameResult:
    """One evaluated frame.

    Attributes:
        time_s: from the beginning of the bag.
        instruction: what the policy was asked.
        error_rad: mean absolute error against what the robot then did, NaN when the recording does not tell.
        known: joint positions of the horizon that it is the mean of.
        compression_rad: mean absolute difference to the reference, NaN without one.
        jump_rad: largest joint step from the chunk before to this one, NaN where they do not overlap.
        latency_ms: of the inference.
        phase: "start" of an instruction (its first second), "moving" or "resting".
        disagreement_rad: of chunks from other noise, NaN when none were drawn.
    """

    time_s: float
    instruction: str
    error_rad: float
    known: int
    compression_rad: float
    jump_rad: float
    latency_ms: float
    phase: str
    disagreement_rad: float


@dataclass(frozen=True)
class Trace:
    """One chunk beside the truth, for plots. Arrays are (T, J) float32 rad, NaN where unknown."""

    frame: int
    time_s: float
    chunk: np.ndarray
    truth: np.ndarray
    reference: np.ndarray | None


@dataclass(frozen=True)
class DecodingSummary:
    """Of chunks that are written as tokens: means over them.

    Attributes:
        passes: of the language model over tokens behind the prompt, for one chunk.
        tokens_per_pass: 1 where they follow each other; with a draft, accepted ones and the model's own.
    """

    passes: float
    tokens_per_pass: float


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
        instructions, phases: instruction, or phase of the motion -> its frames.
        effectors: link -> distances, where a URDF was given.
        agreement: whether joints and units are those of the reference, or of the recording.
        stage_errors: stage -> relative L2 of its outputs, given the reference's inputs; worst of a few frames.
        control, reference_control: the controller on the chunks, where the robot is known.
        serving: how timely an engine of these latencies is at this rate.
        disagreement: None unless samples were asked for.
        jump_rad: largest joint step at each chunk boundary.
        latency_ms: of whole inferences; `stage_ms` of their parts.
        results: every evaluated frame.
        decoding: None where actions are no tokens.
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
    instructions: Mapping[str, GroupSummary]
    phases: Mapping[str, GroupSummary]
    effectors: Mapping[str, EffectorSummary]
    agreement: Agreement
    stage_errors: Mapping[str, float]
    control: ControlSummary | None
    reference_control: ControlSummary | None
    serving: ServingSummary
    disagreement: DisagreementSummary | None
    jump_rad: Percentiles
    latency_ms: Percentiles
    stage_ms: Mapping[str, Percentiles]
    results: tuple[FrameResult, ...]
    traces: tuple[Trace, ...] = field(default=(), repr=False, compare=False)
    snapshots: tuple[Snapshot, ...] = field(default=(), repr=False, compare=False)
    decoding: DecodingSummary | None = None

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
        return {"action_mae_rad": plain(self.action.mean), **{name: plain(getattr(self, name)) for name in kept}}


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
