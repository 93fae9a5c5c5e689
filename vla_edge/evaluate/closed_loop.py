"""A policy drives a simulated robot on a virtual clock, through the observation, engine and controller of the robot.

Nothing here waits: the world stands still while the policy thinks, and its chunk reaches the controller `delay_s` of
world time after the picture was taken, whatever the machine. An episode is therefore the same on every run: the scene
comes from the seed, the noise from the seed and the observation's stamp, and the delay is a parameter.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from vla_edge.engine.runner import Inference
from vla_edge.evaluate.closed_loop_result import ClosedLoopResult, EpisodeRow
from vla_edge.evaluate.metrics import boundary_jump
from vla_edge.evaluate.smoothness import Smoothness
from vla_edge.serve.inference_policy import InferencePolicyError
from vla_edge.serve.policies import make_policy
from vla_edge.serve.server import ChunkServer, Engine
from vla_edge.sim.worlds import WorldError
from vla_edge.sim.worlds import world as world_of
from vla_edge.types import NANOSECONDS, ActionChunk, InferenceTiming, Observation, VlaEdgeError


class ClosedLoopError(VlaEdgeError):
    """A closed-loop run that cannot be set up."""


@dataclass(frozen=True)
class LoopOptions:
    """How the loop is closed.

    Attributes:
        world: one of `sim.worlds.WORLDS`.
        tier: of its episodes; the world's first when None.
        instruction_override: "none", or "shuffled": the policy is given the instruction of another goal of the scene.
        delay_s: world time from an observation to the moment its chunk reaches the controller.
        rate_hz: observations per second of world time.
        control_hz: ticks of the controller, and steps of the world, per second of world time.
        inference: inference policy as `serve.policies.make_policy` reads it.
    """

    tier: str | None = None
    instruction_override: str = "none"
    delay_s: float = 0.1
    rate_hz: float = 5.0
    control_hz: float = 500.0
    inference: str = "asynchronous"
    world: str = "tabletop"

    def __post_init__(self):
        try:
            make_policy(self.inference)
            object.__setattr__(self, "tier", world_of(self.world).tier(self.tier))
        except (InferencePolicyError, WorldError) as error:
            raise ClosedLoopError(str(error)) from None
        if self.instruction_override not in ("none", "shuffled"):
            raise ClosedLoopError(f"instruction_override is {self.instruction_override!r}; it must be none or shuffled")
        for name, low, high in (("delay_s", 0.0, 10.0), ("rate_hz", 0.1, 100.0), ("control_hz", 50.0, 2000.0)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ClosedLoopError(f"{name} is {value}; it must be between {low:g} and {high:g}")


class Rig(Protocol):
    """One world with its controller: what `TabletopRig` is for the G1, and what a test may put in its place."""

    def begin(self, seed: int, options: LoopOptions) -> str:
        """Sets the scene and the controller up; returns the instruction the policy is given."""

    @property
    def now_ns(self) -> int:
        """World time."""

    def observe(self, instruction: str) -> Observation: ...

    def tick(self, seconds: float) -> None:
        """One tick of the controller, and the world up to the next."""

    def accept(self, chunk: ActionChunk) -> bool:
        """Hands a chunk to the controller; False when it is rejected."""

    def commanded(self) -> np.ndarray:
        """(J,) what the controller told the joints in the last tick, in the unit of the world."""

    def finished(self) -> bool:
        """Whether the outcome is decided, or time is up."""

    def row(self, seed: int) -> EpisodeRow:
        """The outcome, judged by the state of the world."""


def run_closed_loop(
    policy,
    seeds: Sequence[int],
    tier: str | None = None,
    instruction_override: str = "none",
    delay_s: float = 0.1,
    rate_hz: float = 5.0,
    workers: int = 1,
    control_hz: float = 500.0,
    rig: Callable[[], Rig] | None = None,
    progress: Callable[[EpisodeRow], None] | None = None,
    inference: str = "asynchronous",
    until: Callable[[EpisodeRow], bool] | None = None,
    world: str = "tabletop",
) -> ClosedLoopResult:
    """Runs one episode for each seed.

    Args:
        policy: bundle or checkpoint directory; a runner; or anything with `infer(observation, seed)`, or a callable
            taking the same and returning a chunk; a policy that cheats gets its rig by `bind(rig)`. With several
            workers it is opened in each: a path, or something that can be pickled.
        seeds: of scene and noise.
        workers: processes.
        rig: makes the world; what `make_rig` makes of its name when None.
        progress: called with each episode, in the order of the seeds.
        until: called with each too; the run ends when it says True (see `sequential`).
        world, tier, delay_s, rate_hz, control_hz, inference: see `LoopOptions`.

    Raises:
        ClosedLoopError: an option is out of range.
    """
    options = LoopOptions(tier, instruction_override, delay_s, rate_hz, control_hz, inference, world)
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ClosedLoopError("there are no seeds; give at least one episode to run")
    rows: list[EpisodeRow] = []
    for row in closed_loop_rows(policy, seeds, options, workers, rig):
        rows.append(row)
        if progress is not None:
            progress(row)
        if until is not None and until(row):
            break
    return ClosedLoopResult.of(rows, options)


def closed_loop_rows(policy, seeds, options: LoopOptions, workers: int = 1, rig=None) -> Iterator[EpisodeRow]:
    """The episodes one by one, in the order of the seeds; closing the iterator runs no more. See `run_closed_loop`."""
    rig = rig or partial(make_rig, options.world)
    if workers <= 1 or len(seeds) == 1:
        made = rig()
        engine = as_engine(policy, made)
        for seed in seeds:
            yield run_episode(made, engine, seed, options)
        return
    # A fresh interpreter for each: renderers and inference threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    policy = str(policy) if isinstance(policy, Path) else policy
    try:
        pickle.dumps((policy, rig))
    except Exception as error:  # noqa: BLE001 - objects refuse to be pickled in many ways
        raise ClosedLoopError(
            f"the policy cannot be sent to {workers} processes ({error}); give the path of a bundle or checkpoint"
        ) from None
    with (
        _one_thread_each(),
        ProcessPoolExecutor(min(workers, len(seeds)), context, _remember, (policy, rig)) as pool,
    ):
        yield from pool.map(_work, seeds, [options] * len(seeds))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """The processes are the parallelism: what they inherit keeps their numeric libraries to one core each."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_worker: dict[str, object] = {}


def _remember(policy, rig) -> None:
    _worker["policy"], _worker["make_rig"] = policy, rig


def _work(seed: int, options: LoopOptions) -> EpisodeRow:
    # Opened here and not at the start of the process, so that a policy that cannot be opened says so itself.
    if "rig" not in _worker:
        rig = _worker["make_rig"]()
        _worker["engine"] = as_engine(_worker["policy"], rig, threads=1)
        _worker["rig"] = rig
    return run_episode(_worker["rig"], _worker["engine"], seed, options)


def make_rig(name: str) -> Rig:
    """The world called `name` with its controller."""
    if name == "metaworld":
        from vla_edge.evaluate.metaworld_rig import MetaWorldRig

        return MetaWorldRig()
    from vla_edge.evaluate.tabletop_rig import TabletopRig

    return TabletopRig()


def run_episode(rig: Rig, engine: Engine, seed: int, options: LoopOptions) -> EpisodeRow:
    """One episode in lockstep.

    As on the robot, one inference runs at a time: an observation that is due meanwhile is taken the moment it ends.
    """
    instruction = rig.begin(seed, options)
    server = ChunkServer(engine, make_policy(options.inference), seed)
    smoothness = Smoothness(1.0 / options.control_hz)
    start_ns = rig.now_ns
    period_ns, delay_ns = NANOSECONDS / options.rate_hz, round(options.delay_s * NANOSECONDS)
    slot, due, underway = 0, False, None
    chunks = rejected = 0
    jumps: list[float] = []
    while not rig.finished():
        now_ns = rig.now_ns
        while now_ns >= start_ns + slot * period_ns - 1:
            slot, due = slot + 1, True
        if underway is not None and now_ns >= underway.stamp_ns + delay_ns:
            previous, accepted = server.running, rig.accept(server.deliver(underway, now_ns))
            rejected += not accepted
            chunks, underway = chunks + 1, None
            jump = boundary_jump(previous, server.running) if previous is not None else None
            if jump is not None:
                jumps.append(float(jump.max()))
            if accepted:
                smoothness.switch(previous, server.running, now_ns)
        if due and underway is None and server.due(instruction, now_ns):
            due = False
            underway, _ = server.infer(rig.observe(instruction))
            if delay_ns == 0:
                continue
        rig.tick(1.0 / options.control_hz)
        smoothness.add(rig.commanded())
    row = rig.row(seed)
    return row.with_chunks(chunks, rejected, float(np.mean(jumps)) if jumps else math.nan, smoothness.result())


class _Callable:
    """A function (observation, seed) -> chunk as an engine that cannot continue a plan."""

    def __init__(self, infer: Callable[[Observation, int], ActionChunk]):
        self._infer = infer

    def infer(self, observation: Observation, seed: int = 0, **options) -> Inference:
        if options:
            raise ClosedLoopError("this policy cannot continue a plan; choose an inference policy that does not ask it")
        return Inference(self._infer(observation, seed), InferenceTiming(0.0))


def as_engine(policy, rig: Rig, threads: int | None = None) -> Engine:
    """An engine of whatever a policy may be, see `run_closed_loop`; `rig` is bound to one that cheats."""
    if isinstance(policy, (str, Path)):
        from vla_edge.evaluate.replay import open_policy

        policy = open_policy(policy, threads)
    if hasattr(policy, "bind"):
        policy.bind(rig)
    if getattr(getattr(policy, "spec", None), "lags", ()):
        raise ClosedLoopError(
            "the policy reads several observations at a time and a closed loop shows one; use a recording"
        )
    if hasattr(policy, "infer"):
        if hasattr(policy, "warm_up"):
            policy.warm_up()
        return policy
    if callable(policy):
        return _Callable(policy)
    raise ClosedLoopError(f"{type(policy).__name__} is no policy; give a bundle, a checkpoint or something with infer")
