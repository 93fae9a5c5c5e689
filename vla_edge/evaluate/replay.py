"""Runs an engine over a bag as fast as it goes: what it would have done, against what the robot did.

The observations pass through the very `Runner` that serves the robot, with the noise the robot would have drawn, so
everything but the latencies is the same to the last digit on every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vla_edge.engine.remote import is_address
from vla_edge.evaluate.bag import Bag, BagError
from vla_edge.evaluate.contract import TopicContract
from vla_edge.evaluate.evaluation import Evaluation
from vla_edge.evaluate.kinematics import Kinematics
from vla_edge.evaluate.metrics import Percentiles
from vla_edge.evaluate.read_ahead import ahead
from vla_edge.evaluate.tally import Tally
from vla_edge.robots.robot import Robot, RobotError
from vla_edge.types import NANOSECONDS, Observation, VlaEdgeError

# Frames whose observations are shown to single stages as well, to find the one that errs.
STAGE_FRAMES = 4


class ReplayError(VlaEdgeError):
    """An engine and a reference that cannot be compared."""


class Policy(Protocol):
    """What is evaluated: `engine.runner.Runner`, or anything that behaves like one."""

    spec: object

    def infer(self, observation: Observation, seed: int = 0, noise: np.ndarray | None = None): ...


@dataclass(frozen=True)
class ReplayOptions:
    """How a recording is replayed.

    Attributes:
        rate_hz: frames taken per second of recording; None takes every frame.
        seed: of the policy's noise, together with each observation's stamp.
        max_frames: stop after this many; None for all.
        delay_s: on the virtual clock, from an observation to the moment its chunk reaches the controller.
        robot: joint table whose limits the controller keeps; None takes the G1's where it has the policy's joints.
        urdf: of the robot, for distances of its end effectors; None for none.
        links: the end effectors; None for the last link of every chain the policy moves.
        samples: further chunks from other noise at every frame, for the policy's disagreement with itself.
    """

    rate_hz: float | None = 5.0
    seed: int = 0
    max_frames: int | None = None
    delay_s: float = 0.1
    robot: Robot | None = None
    urdf: str | None = None
    links: tuple[str, ...] | None = None
    samples: int = 0


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
    contract: TopicContract | None = None,
    progress: Callable[[float, int], None] | None = None,
    threads: int | None = None,
    **options,
) -> Evaluation:
    """Evaluates an engine on a recording.

    Args:
        bag: rosbag2 directory or file, ROS 1 bag, or LeRobot dataset.
        engine: bundle or checkpoint directory, or a runner.
        reference: full precision to compare with on the same frames.
        contract: which topic plays which part.
        progress: called with the fraction of the bag that is done, and frames so far.
        threads: of the engine; the backend's choice when None.
        options: those of `ReplayOptions`.

    Raises:
        BagError, DatasetError: the recording cannot be read, lacks a part, or no frame of it can be evaluated.
        ReplayError: engine and reference are not of the same joints and horizon.
        RobotError, KinematicsError: robot or URDF lack a joint of the policy.
    """
    chosen = ReplayOptions(**options)
    policy = open_policy(engine, threads)
    against = open_policy(reference) if reference is not None else None
    check_pair(policy, against)
    for runner in (policy, against):
        if hasattr(runner, "warm_up"):
            runner.warm_up()
    spec = policy.spec
    kinematics = Kinematics(chosen.urdf, spec.joint_names, chosen.links) if chosen.urdf else None
    robot = chosen.robot or known_robot(spec.joint_names)
    tally = Tally(spec, against.spec if against else None, robot, chosen.delay_s, kinematics)
    refused: Counter[str] = Counter()
    shown: list[Observation] = []
    with _open(bag, contract) as opened:
        cameras = tuple(camera.name for camera in spec.cameras)
        start_ns, duration_s = opened.start_ns, opened.duration_s
        span_s = max(opened.span_s, 1e-9)
        frames = opened.frames(
            cameras, spec.measured_names, chosen.rate_hz, spec.chunk_size * spec.dt, spec.lags, spec.reads_instruction
        )
        # What is read ahead of an early end would be counted as left out.
        for frame in ahead(frames) if chosen.max_frames is None else frames:
            observation = frame.observation
            time_s = (observation.stamp_ns - start_ns) / NANOSECONDS
            try:
                found = policy.infer(observation, seed=chosen.seed)
                other = against.infer(observation, seed=chosen.seed).chunk if against is not None else None
                more = [
                    policy.infer(observation, seed=chosen.seed + 1 + k).chunk.positions for k in range(chosen.samples)
                ]
                tally.add(frame, time_s, found.chunk, found.timing, other, more)
            except VlaEdgeError as error:
                refused[f"frame the policy refuses: {error}"] += 1
            else:
                if len(shown) < STAGE_FRAMES:
                    shown.append(observation)
            if progress is not None:
                progress(min(1.0, time_s / span_s), len(tally.results))
            if chosen.max_frames is not None and len(tally.results) >= chosen.max_frames:
                break
        skipped = {**opened.skipped, **refused}
        if not tally.results:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(skipped.items()))
            raise BagError(f"no frame of bag {bag} can be evaluated: {reasons or 'it has none'}")
        warnings = opened.warnings
    return _evaluation(
        tally, policy, against, chosen, Path(bag).name, duration_s, skipped, tuple(warnings),
        stage_errors(policy, against, shown, chosen.seed),
    )


def check_pair(engine: Policy, reference: Policy | None) -> None:
    """Nothing, when both speak of the same joints at the same times.

    Raises:
        ReplayError: they do not.
    """
    if reference is None:
        return
    ours, theirs = engine.spec, reference.spec
    odd = sorted(set(ours.joint_names) ^ set(theirs.joint_names))
    if odd:
        raise ReplayError(f"engine and reference differ in joints ({', '.join(odd[:4])}); give the engine's checkpoint")
    if (ours.chunk_size, ours.dt) != (theirs.chunk_size, theirs.dt):
        raise ReplayError(
            f"the engine gives {ours.chunk_size} points of {ours.dt:g} s, the reference {theirs.chunk_size} of "
            f"{theirs.dt:g} s; give the engine's checkpoint"
        )


def known_robot(joint_names: tuple[str, ...]) -> Robot | None:
    """The G1 where it has all these joints; None for joints of a robot that is not known."""
    from vla_edge.robots.g1 import g1

    robot = g1()
    try:
        robot.check(joint_names)
    except RobotError:
        return None
    return robot


def stage_errors(
    policy: Policy, reference: Policy | None, observations: list[Observation], seed: int
) -> dict[str, float]:
    """Stage -> worst relative L2 of its outputs, given the reference's inputs; empty where there are no stages."""
    if not (hasattr(policy, "stages") and hasattr(reference, "stage_inputs")):
        return {}
    from vla_edge.engine.verify import compare_stages

    found = compare_stages(policy, reference, observations, seed)
    return {stage: max(row["relative_l2"] for row in outputs.values()) for stage, outputs in found.items()}


def describe(policy: Policy) -> dict:
    """Name, kind and whatever else a runner tells about itself."""
    told = getattr(policy, "description", None)
    if callable(told):
        told = told()
    return dict(told) if isinstance(told, Mapping) else {"name": type(policy).__name__}


def _open(path: str | Path, contract: TopicContract | None):
    if (Path(path) / "meta" / "info.json").is_file():
        from vla_edge.evaluate.lerobot_dataset import LeRobotDataset

        return LeRobotDataset(path)
    return Bag(path, contract)


def _evaluation(
    tally: Tally,
    policy: Policy,
    reference: Policy | None,
    options: ReplayOptions,
    bag: str,
    duration_s: float,
    skipped: Mapping[str, int],
    warnings: tuple[str, ...],
    stages: Mapping[str, float],
) -> Evaluation:
    spec, results = policy.spec, tuple(tally.results)
    action = tally.summary("action")
    if action is None:
        raise BagError(f"bag {bag} ends, or changes its instruction, before any motion follows a frame; record longer")
    return Evaluation(
        bag=bag,
        duration_s=duration_s,
        rate_hz=options.rate_hz,
        frames=len(results),
        skipped=dict(sorted(skipped.items())),
        warnings=warnings,
        engine=describe(policy),
        reference=describe(reference) if reference is not None else None,
        joint_names=tuple(spec.joint_names),
        dt=spec.dt,
        chunk_size=spec.chunk_size,
        seed=options.seed,
        action=action,
        hold=tally.summary("hold"),
        command=tally.summary("command"),
        reference_action=tally.summary("reference"),
        compression=tally.compression(),
        instructions=tally.groups("instruction"),
        phases=tally.groups("phase"),
        effectors=tally.effectors(),
        agreement=tally.agreement.result(),
        stage_errors=stages,
        control=tally.control.summary() if tally.control is not None else None,
        reference_control=tally.reference_control.summary() if tally.reference_control is not None else None,
        serving=tally.serving.summary(),
        disagreement=tally.disagreement(),
        jump_rad=Percentiles.of([r.jump_rad for r in results if np.isfinite(r.jump_rad)]),
        latency_ms=Percentiles.of([r.latency_ms for r in results]),
        stage_ms={name: Percentiles.of(values) for name, values in tally.stage_ms().items()},
        results=results,
        traces=tuple(tally.traces),
        snapshots=tally.worst.snapshots(),
        decoding=tally.decoding(),
    )
