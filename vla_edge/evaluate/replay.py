"""Runs an engine over a bag as fast as it goes: what it would have done, against what the robot did.

The observations pass through the very `Runner` that serves the robot, with the noise the robot would have drawn, so
everything but the latencies is the same to the last digit on every run.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from vla_edge.engine.remote import is_address
from vla_edge.evaluate.bag import Bag, BagError, Frame
from vla_edge.evaluate.contract import TopicContract
from vla_edge.evaluate.evaluation import (
    CompressionSummary,
    ErrorSummary,
    Evaluation,
    FrameResult,
    Snapshot,
    Trace,
)
from vla_edge.evaluate.metrics import (
    ErrorTable,
    MotionScale,
    Percentiles,
    bootstrap_interval,
    boundary_jump,
    chunk_stamps,
    cosine,
)
from vla_edge.policy.preprocess import positions_by_name
from vla_edge.types import NANOSECONDS, Observation, VlaEdgeError

# What the report can show: enough to look at, little enough to mail.
MAX_TRACES = 150
MAX_SNAPSHOTS = 6
SNAPSHOT_SPACING_S = 2.0
# Neighbouring frames see nearly the same; an interval draws stretches of this many horizons.
BLOCK_HORIZONS = 2.0


class Policy(Protocol):
    """What is evaluated: `engine.runner.Runner`, or anything that behaves like one."""

    spec: object

    def infer(self, observation: Observation, seed: int = 0, noise: np.ndarray | None = None): ...


def open_policy(source: Policy | str | Path, threads: int | None = None) -> Policy:
    """A runner for an engine bundle, a checkpoint directory or a policy server's address; a runner as it is.

    Args:
        threads: of an engine; the backend's choice when None.

    Raises:
        BundleError, CheckpointError: the directory is neither a valid bundle nor a valid checkpoint.
        RemoteError: there is no policy server at that address.
    """
    if not isinstance(source, (str, Path)):
        return source
    if is_address(str(source)):
        from vla_edge.engine.remote.client import RemoteRunner

        return RemoteRunner(str(source))
    from vla_edge.engine.runner import Runner

    bundle = (Path(source) / "manifest.yaml").exists()
    return Runner.from_bundle(source, threads=threads) if bundle else Runner.from_checkpoint(source)


def evaluate_bag(
    bag: str | Path,
    engine: Policy | str | Path,
    reference: Policy | str | Path | None = None,
    rate_hz: float | None = 5.0,
    seed: int = 0,
    contract: TopicContract | None = None,
    max_frames: int | None = None,
    progress: Callable[[float, int], None] | None = None,
) -> Evaluation:
    """Evaluates an engine on a recording.

    Args:
        bag: rosbag2 directory or file.
        engine: bundle or checkpoint directory, or a runner.
        reference: full precision to compare with on the same frames.
        rate_hz: frames taken per second of bag; None takes every frame.
        seed: of the policy's noise, together with each observation's stamp.
        contract: which topic plays which part.
        max_frames: stop after this many.
        progress: called with the fraction of the bag that is done, and frames so far.

    Raises:
        BagError: the bag cannot be read, lacks a topic, or no frame of it can be evaluated.
    """
    policy = open_policy(engine)
    against = open_policy(reference) if reference is not None else None
    for runner in (policy, against):
        if hasattr(runner, "warm_up"):
            runner.warm_up()
    spec = policy.spec
    tally = _Tally(policy, against, seed)
    with Bag(bag, contract) as opened:
        cameras = tuple(camera.name for camera in spec.cameras)
        start_ns, span_ns = opened.storage.start_ns, max(opened.storage.end_ns - opened.storage.start_ns, 1)
        refused: dict[str, int] = defaultdict(int)
        for frame in opened.frames(cameras, spec.joint_names, rate_hz, spec.chunk_size * spec.dt):
            try:
                tally.add(frame, (frame.observation.stamp_ns - start_ns) / NANOSECONDS)
            except VlaEdgeError as error:
                refused[f"frame the policy refuses: {error}"] += 1
            if progress is not None:
                progress(min(1.0, (frame.observation.stamp_ns - start_ns) / span_ns), len(tally.results))
            if max_frames is not None and len(tally.results) >= max_frames:
                break
        skipped = {**opened.skipped, **refused}
        if not tally.results:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(skipped.items()))
            raise BagError(f"no frame of bag {bag} can be evaluated: {reasons or 'it has none'}")
        return tally.evaluation(Path(bag).name, opened.duration_s, rate_hz, skipped, tuple(opened.storage.warnings))


class _Tally:
    """Figures that grow frame by frame; what is kept of each frame is a few numbers."""

    def __init__(self, policy: Policy, reference: Policy | None, seed: int):
        spec = policy.spec
        self._policy, self._reference, self._seed, self._spec = policy, reference, seed, spec
        size = (spec.chunk_size, len(spec.joint_names))
        self._action, self._hold, self._command = (ErrorTable(*size) for _ in range(3))
        self._reference_action, self._compression = ErrorTable(*size), ErrorTable(*size)
        self._motion = MotionScale()
        self._cosines: list[float] = []
        self._per_frame: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._stages: dict[str, list[float]] = defaultdict(list)
        self._previous = None
        self.results: list[FrameResult] = []
        self._traces: list[Trace] = []
        self._worst: list[tuple[float, int, Mapping[str, bytes]]] = []

    def add(self, frame: Frame, time_s: float) -> None:
        observation, spec = frame.observation, self._spec
        inference = self._policy.infer(observation, seed=self._seed)
        other = self._reference.infer(observation, seed=self._seed).chunk if self._reference is not None else None
        chunk, names = inference.chunk, spec.joint_names
        stamps = chunk_stamps(chunk)
        current = positions_by_name(observation.joints, names)
        truth = frame.measured.at(stamps, names)
        error = self._note("action", self._action, chunk.positions - truth)
        self._note("hold", self._hold, current - truth)
        commanded = frame.commanded.at(stamps, names) if frame.commanded is not None else np.full_like(truth, np.nan)
        self._note("command", self._command, chunk.positions - commanded)
        difference = math.nan
        if other is not None:
            self._note("reference", self._reference_action, other.positions - truth)
            difference = self._note("compression", self._compression, chunk.positions - other.positions)
            self._motion.add(other.positions, current)
            self._cosines.append(cosine(chunk.positions - current, other.positions - current))
        jump = boundary_jump(self._previous, chunk) if self._previous is not None else None
        # A new instruction is meant to change the plan, so the step to it says nothing about the engine.
        same = bool(self.results) and self.results[-1].instruction == observation.instruction
        self._previous = chunk
        for part, seconds in self._parts(inference.timing):
            self._stages[part].append(1e3 * seconds)
        index = len(self.results)
        self.results.append(
            FrameResult(
                time_s,
                observation.instruction,
                error,
                difference,
                float(jump.max()) if jump is not None and same else math.nan,
                1e3 * inference.timing.total,
            )
        )
        if index < MAX_TRACES:
            kept = (chunk.positions, truth, other.positions if other is not None else None)
            kept = [value if value is None else value.astype(np.float32) for value in kept]
            self._traces.append(Trace(index, time_s, *kept))
        self._remember(error, index, time_s, observation.images)

    def _note(self, kind: str, table: ErrorTable, error: np.ndarray) -> float:
        mean, known = table.add(error)
        self._per_frame[kind].append((mean, known))
        return mean

    @staticmethod
    def _parts(timing):
        yield "preprocess", timing.preprocess
        yield from timing.stages.items()
        yield "postprocess", timing.postprocess

    def _remember(self, error: float, index: int, time_s: float, images: Mapping[str, np.ndarray]) -> None:
        """Keeps the worst frames, at most one of each stretch of `SNAPSHOT_SPACING_S`."""
        if not math.isfinite(error):
            return
        near = [kept for kept in self._worst if abs(self.results[kept[1]].time_s - time_s) < SNAPSHOT_SPACING_S]
        if any(kept[0] >= error for kept in near):
            return
        self._worst = [kept for kept in self._worst if kept not in near]
        if len(self._worst) >= MAX_SNAPSHOTS and self._worst[-1][0] >= error:
            return
        self._worst.append((error, index, {name: thumbnail(pixels) for name, pixels in images.items()}))
        self._worst = sorted(self._worst, key=lambda kept: (-kept[0], kept[1]))[:MAX_SNAPSHOTS]

    def _summary(self, kind: str, table: ErrorTable) -> ErrorSummary | None:
        if not table.count:
            return None
        per_frame, weights = np.array(self._per_frame[kind]).T
        known = weights > 0
        block_s = BLOCK_HORIZONS * self._spec.chunk_size * self._spec.dt
        blocks = np.array([int(result.time_s / block_s) for result in self.results])
        return ErrorSummary(
            table.mean(),
            bootstrap_interval(per_frame[known], blocks[known], weights[known]),
            dict(zip(self._spec.joint_names, table.per_joint())),
            table.per_step(),
            table.count,
        )

    def evaluation(self, bag: str, duration_s: float, rate_hz, skipped, warnings) -> Evaluation:
        spec, results = self._spec, tuple(self.results)
        action, hold = self._summary("action", self._action), self._summary("hold", self._hold)
        if action is None:
            raise BagError(
                f"bag {bag} ends, or changes its instruction, before any motion follows a frame; record longer"
            )
        difference, compression = self._summary("compression", self._compression), None
        if difference is not None:
            scale = self._motion.std()
            compression = CompressionSummary(
                difference,
                difference.mean / scale if scale else math.nan,
                scale,
                float(np.mean(self._cosines)),
                float(np.min(self._cosines)),
            )
        by_instruction: dict[str, list[float]] = defaultdict(list)
        for result in results:
            by_instruction[result.instruction].append(result.error_rad)
        return Evaluation(
            bag=bag,
            duration_s=duration_s,
            rate_hz=rate_hz,
            frames=len(results),
            skipped=dict(sorted(skipped.items())),
            warnings=warnings,
            engine=describe(self._policy),
            reference=describe(self._reference) if self._reference is not None else None,
            joint_names=tuple(spec.joint_names),
            dt=spec.dt,
            chunk_size=spec.chunk_size,
            seed=self._seed,
            action=action,
            hold=hold,
            command=self._summary("command", self._command),
            reference_action=self._summary("reference", self._reference_action),
            compression=compression,
            instructions={text: (len(errors), _mean(errors)) for text, errors in sorted(by_instruction.items())},
            jump_rad=Percentiles.of([r.jump_rad for r in results if math.isfinite(r.jump_rad)]),
            latency_ms=Percentiles.of([r.latency_ms for r in results]),
            stage_ms={name: Percentiles.of(values) for name, values in self._stages.items()},
            results=results,
            traces=tuple(self._traces),
            snapshots=tuple(Snapshot(index, pictures) for _, index, pictures in self._worst),
        )


def describe(policy: Policy) -> dict:
    """Name, kind and whatever else a runner tells about itself."""
    told = getattr(policy, "description", None)
    if callable(told):
        told = told()
    return dict(told) if isinstance(told, Mapping) else {"name": type(policy).__name__}


def thumbnail(pixels: np.ndarray, width: int = 320) -> bytes:
    """JPEG bytes of an RGB frame, at most `width` pixels wide."""
    import cv2

    height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA) if pixels.shape[1] > width else pixels
    return cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def _mean(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
