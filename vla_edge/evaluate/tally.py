"""The figures of a replay, growing frame by frame; what is kept of each frame is a few numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from vla_edge.evaluate.agreement import AgreementTally
from vla_edge.evaluate.control_replay import ControlReplay
from vla_edge.evaluate.evaluation import (
    CompressionSummary,
    DecodingSummary,
    DisagreementSummary,
    EffectorSummary,
    ErrorSummary,
    FrameResult,
    GroupSummary,
    Trace,
)
from vla_edge.evaluate.frame_stream import Frame
from vla_edge.evaluate.kinematics import Kinematics
from vla_edge.evaluate.metrics import (
    ErrorTable,
    MotionScale,
    Percentiles,
    bootstrap_intervals,
    boundary_jump,
    chunk_stamps,
    cosine,
    rank_correlation,
)
from vla_edge.evaluate.rows import Rows
from vla_edge.evaluate.serving import PAUSE_S, ServingTally
from vla_edge.evaluate.worst_frames import WorstFrames
from vla_edge.policy.preprocess import positions_by_name
from vla_edge.policy.spec import PolicySpec
from vla_edge.robots.robot import Robot
from vla_edge.types import NANOSECONDS, ActionChunk, InferenceTiming

# Chunks kept for plots: enough to look at, little enough to mail.
MAX_TRACES = 150
# Neighbouring frames see nearly the same; an interval draws stretches of this many horizons.
BLOCK_HORIZONS = 2.0
START_S = 1.0
# Less motion than this over a whole horizon, rad, is rest.
REST_RAD = 0.02


class Tally:
    """Takes frames and chunks, gives summaries.

    Args:
        spec: of the engine. reference: of full precision, None without one.
        robot: whose controller the chunks pass through, None for none. delay_s: from an observation to its chunk there.
        kinematics: end effectors, None for none.

    Attributes:
        agreement, control, reference_control, serving: tallies of their own; the controllers None without a robot.
        results: every frame so far. traces: the first of them, worst: those with the largest errors, to look at.
    """

    def __init__(
        self,
        spec: PolicySpec,
        reference: PolicySpec | None,
        robot: Robot | None,
        delay_s: float,
        kinematics: Kinematics | None,
    ):
        self.spec, self._kinematics = spec, kinematics
        size = (spec.chunk_size, len(spec.joint_names))
        kinds = ("action", "hold", "command", "reference", "compression")
        self._tables = {kind: ErrorTable(*size) for kind in kinds}
        # kind -> of each frame, (2, J): sum of magnitudes and how many are known
        self._per_frame = {kind: Rows((2, len(spec.joint_names))) for kind in kinds}
        self._reach = defaultdict(list)
        self._motion, self._cosines = MotionScale(), []
        self._stages: dict[str, list[float]] = defaultdict(list)
        self._passes = self._decoded = 0
        self.agreement = AgreementTally(spec, reference)
        self.control, self.reference_control = (
            ControlReplay(robot, spec.joint_names, delay_s) if robot is not None and wanted else None
            for wanted in (True, reference is not None)
        )
        self.serving = ServingTally()
        self._previous: ActionChunk | None = None
        self._begun_s = math.nan
        self._samples = 0
        self.results: list[FrameResult] = []
        self.traces: list[Trace] = []
        self.worst = WorstFrames()

    def add(
        self,
        frame: Frame,
        time_s: float,
        chunk: ActionChunk,
        timing: InferenceTiming,
        other: ActionChunk | None,
        samples: list[np.ndarray],
    ) -> None:
        """One frame.

        Args:
            time_s: since the beginning of the recording.
            chunk: the engine's. other: the reference's.
            samples: the engine's positions from other noise, each (T, J) rad.
        """
        observation, names = frame.observation, self.spec.joint_names
        stamps, current = chunk_stamps(chunk), positions_by_name(observation.joints, names)
        truth = frame.measured.at(stamps, names)
        theirs = None if other is None else in_order(other, names)
        error = self._note("action", chunk.positions - truth)
        self._note("hold", current - truth)
        commanded = frame.commanded.at(stamps, names) if frame.commanded is not None else np.full_like(truth, np.nan)
        self._note("command", chunk.positions - commanded)
        difference = math.nan
        if theirs is not None:
            self._note("reference", theirs - truth)
            difference = self._note("compression", chunk.positions - theirs)
            self._cosines.append(cosine(chunk.positions - current, theirs - current))
        self._motion.add(chunk.positions if theirs is None else theirs, current)
        self.agreement.add(current, chunk.positions - current, (truth if theirs is None else theirs) - current, truth)
        if self._kinematics is not None:
            self._note_reach(chunk.positions, truth, theirs)
        if self.control is not None:
            self.control.add(chunk, observation.joints)
        if self.reference_control is not None and other is not None:
            self.reference_control.add(other, observation.joints)
        self.serving.add(observation.stamp_ns, timing.total)
        jump = boundary_jump(self._previous, chunk) if self._previous is not None else None
        pause = self._previous is None or not 0 <= chunk.stamp_ns - self._previous.stamp_ns <= PAUSE_S * NANOSECONDS
        # A new instruction is meant to change the plan, so the step to it says nothing about the engine.
        same = bool(self.results) and self.results[-1].instruction == observation.instruction
        if pause or not same:
            self._begun_s = time_s
        self._previous = chunk
        for part, seconds in _parts(timing):
            self._stages[part].append(1e3 * seconds)
        self._passes, self._decoded = self._passes + timing.passes, self._decoded + timing.decoded
        index, self._samples = len(self.results), len(samples)
        self.results.append(
            FrameResult(
                time_s,
                observation.instruction,
                error,
                int(np.isfinite(truth).sum()),
                difference,
                float(jump.max()) if jump is not None and same else math.nan,
                1e3 * timing.total,
                self._phase(time_s, truth, current),
                float(np.std([chunk.positions, *samples], axis=0).mean()) if samples else math.nan,
            )
        )
        if index < MAX_TRACES:
            kept = (None if value is None else value.astype(np.float32) for value in (chunk.positions, truth, theirs))
            self.traces.append(Trace(index, time_s, *kept))
        self.worst.offer(error, index, time_s, observation.images)

    def stage_ms(self) -> Mapping[str, list[float]]:
        """Part of an inference -> its milliseconds."""
        return self._stages

    def decoding(self) -> DecodingSummary | None:
        """None where actions are no tokens."""
        if not self._passes:
            return None
        return DecodingSummary(self._passes / len(self.results), self._decoded / self._passes)

    def summary(self, kind: str) -> ErrorSummary | None:
        """Of "action", "hold", "command", "reference" or "compression"; None where nothing is known."""
        table, names = self._tables[kind], self.spec.joint_names
        if not table.count:
            return None
        sums, counts = np.moveaxis(self._per_frame[kind].array(), 1, 0)
        both = [np.column_stack([values.sum(axis=1), values]) for values in (sums, counts)]
        whole, *joints = bootstrap_intervals(*both, self._blocks())
        return ErrorSummary(
            table.mean(),
            whole,
            dict(zip(names, table.per_joint())),
            dict(zip(names, joints)),
            table.per_step(),
            table.count,
        )

    def compression(self) -> CompressionSummary | None:
        """The engine against its reference; None without one."""
        difference = self.summary("compression")
        if difference is None:
            return None
        scale, cosines = self._motion.std(), self._cosines
        relative = difference.mean / scale if scale else math.nan
        return CompressionSummary(difference, relative, scale, float(np.mean(cosines)), float(np.min(cosines)))

    def groups(self, attribute: str) -> dict[str, GroupSummary]:
        """By `instruction` or `phase` of the frames."""
        labels = np.array([getattr(result, attribute) for result in self.results], object)
        blocks = self._blocks()
        totals = {
            kind: rows.array().sum(axis=2) if len(rows := self._per_frame[kind]) else np.zeros((len(labels), 2))
            for kind in ("action", "compression")
        }
        found = {}
        for label in sorted(set(labels)):
            mine = labels == label
            (sums, counts), (apart, pairs) = (totals[kind][mine].T for kind in ("action", "compression"))
            interval = bootstrap_intervals(sums[:, None], counts[:, None], blocks[mine])[0]
            found[label] = GroupSummary(int(mine.sum()), _ratio(sums, counts), interval, _ratio(apart, pairs))
        return found

    def effectors(self) -> dict[str, EffectorSummary]:
        """End effector -> distances."""
        found, blocks = {}, self._blocks()
        for index, link in enumerate(self._kinematics.links if self._kinematics is not None else ()):
            action = np.array(self._reach["action"])[:, :, index]
            known = np.isfinite(action)
            magnitudes, counts = np.where(known, action, 0.0), known.sum(axis=1)
            interval = bootstrap_intervals(magnitudes.sum(axis=1)[:, None], counts[:, None], blocks)[0]
            apart = self._reach["compression"]
            found[link] = EffectorSummary(
                _ratio(magnitudes, counts),
                interval,
                float(np.mean([frame[:, index] for frame in apart])) if apart else math.nan,
                tuple(_ratio(magnitudes[:, step], known[:, step]) for step in range(action.shape[1])),
            )
        return found

    def disagreement(self) -> DisagreementSummary | None:
        """None when no samples were drawn."""
        if not self._samples:
            return None
        spread = np.array([result.disagreement_rad for result in self.results])
        error = np.array([result.error_rad for result in self.results])
        known, scale = np.isfinite(error), self._motion.std()
        top = spread >= np.quantile(spread[known], 0.9) if known.any() else known
        high, low = error[known & top], error[known & ~top]
        return DisagreementSummary(
            self._samples + 1,
            Percentiles.of(spread),
            float(spread.mean()) / scale if scale else math.nan,
            rank_correlation(spread[known], error[known]),
            float(high.mean() / low.mean()) if high.size and low.size and low.mean() else math.nan,
        )

    def _blocks(self) -> np.ndarray:
        block_s = BLOCK_HORIZONS * self.spec.chunk_size * self.spec.dt
        return np.array([int(result.time_s / block_s) for result in self.results])

    def _note(self, kind: str, error: np.ndarray) -> float:
        mean, _ = self._tables[kind].add(error)
        known = np.isfinite(error)
        self._per_frame[kind].add([np.where(known, np.abs(error), 0.0).sum(axis=0), known.sum(axis=0)])
        return mean

    def _note_reach(self, ours: np.ndarray, truth: np.ndarray, theirs: np.ndarray | None) -> None:
        place = self._kinematics.positions
        at = place(ours)
        self._reach["action"].append(np.float32(1e3 * np.linalg.norm(at - place(truth), axis=-1)))
        if theirs is not None:
            self._reach["compression"].append(np.float32(1e3 * np.linalg.norm(at - place(theirs), axis=-1)))

    def _phase(self, time_s: float, truth: np.ndarray, current: np.ndarray) -> str:
        if time_s - self._begun_s < START_S:
            return "start"
        known = truth[np.isfinite(truth).all(axis=1)]
        return "moving" if known.size and np.abs(known - current).max() >= REST_RAD else "resting"


def in_order(chunk: ActionChunk, names: tuple[str, ...]) -> np.ndarray:
    """(T, J) rad of a chunk, joints in the order of `names`."""
    if chunk.joint_names == names:
        return chunk.positions
    return chunk.positions[:, [chunk.joint_names.index(name) for name in names]]


def _parts(timing: InferenceTiming) -> Iterator[tuple[str, float]]:
    yield "preprocess", timing.preprocess
    yield from timing.stages.items()
    yield "postprocess", timing.postprocess


def _ratio(sums: np.ndarray, counts: np.ndarray) -> float:
    total = float(np.sum(counts))
    return float(np.sum(sums)) / total if total else math.nan
