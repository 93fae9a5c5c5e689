"""Random and adversarial chunks, and everything else that can be done to a kernel, with a judge that misses nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rig import MS, Rig

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlError
from vla_edge.control.modes import Mode
from vla_edge.control.screening import RejectedChunk
from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.types import ActionChunk, JointState

KINDS = (
    "near", "jitter", "alternate", "ramp_out", "at_limit", "jump", "huge", "tiny_dt", "nan", "inf", "late", "future",
    "short", "names", "permuted", "wrong_names", "fast",
)


def chunk_of(kind: str, rig: Rig, rng) -> ActionChunk:
    """One chunk of a kind, built around the running command so that many are accepted."""
    lower, upper, top, *_ = rig.limits()
    points = int(rng.integers(2, 40))
    dt = float(rng.choice([0.002, 0.01, 0.02, 0.05, 0.2]))
    age, newest = float(rng.uniform(0.0, 0.9 * min(points * dt, 1.0))), rig.kernel.chunk_stamp_ns
    if newest is not None and rng.random() < 0.85:
        age = min(age, float(rng.uniform(0.0, max(1e-9 * (rig.now - newest), 0.0))))  # mostly newer than the last one
    joints = len(rig.names)
    base, names = rig.kernel.position.copy(), rig.names
    reach = top * 2 * dt
    walk = np.cumsum(rng.uniform(-1, 1, (points, joints)) * reach, axis=0)
    positions = base + 0.3 * np.tanh(walk)
    if kind == "jitter":
        positions = base + rng.uniform(-0.5, 0.5, (points, joints)) * reach
    elif kind == "alternate":
        positions = base + np.where(np.arange(points)[:, None] % 2, 0.49, -0.49) * reach
    elif kind == "ramp_out":
        positions = base + np.arange(points)[:, None] * reach * rng.choice([-0.99, 0.99], joints)
        positions = np.clip(positions, lower - 0.09, upper + 0.09)
    elif kind == "at_limit":
        positions = np.tile(np.where(rng.random(joints) < 0.5, lower - 0.09, upper + 0.09), (points, 1))
    elif kind == "jump":
        positions = base + rng.uniform(-0.5, 0.5, joints) + np.zeros((points, joints))
    elif kind == "huge":
        positions = base + rng.normal(0, 10.0 ** rng.integers(0, 300), (points, joints))
    elif kind == "tiny_dt":
        dt = float(rng.choice([1e-300, 1e-6, 0.001, -1.0, np.nan]))
    elif kind in ("nan", "inf"):
        positions[rng.integers(points), rng.integers(joints)] = np.nan if kind == "nan" else -np.inf
    elif kind == "late":
        age = float(rng.uniform(0, 3))
    elif kind == "future":
        age = float(rng.uniform(-0.3, 0))
    elif kind == "short":
        positions = positions[: rng.integers(0, 3)]
    elif kind == "wrong_names":
        names = ("elbow", *names[1:])
    elif kind == "permuted":
        order = rng.permutation(joints)
        positions, names = positions[:, order], tuple(names[i] for i in order)
    elif kind == "fast":
        positions = base + np.cumsum(np.tile(top * dt * rng.uniform(0, 4), (points, 1)), axis=0)
    return ActionChunk(rig.now - round(age * 1e9), names, positions, dt)


def disturb(rig: Rig, rng) -> None:
    """Something an operator, a bad sensor or a busy machine may do."""
    what, kernel = rng.integers(0, 15), rig.kernel
    try:
        if what == 0:
            kernel.set_speed_scale(float(rng.choice([0.0, 0.2, 1.0, 1.0, 1.0, np.nan, 7.0])))
        elif what == 1 and rng.random() < 0.3:
            kernel.hold()
        elif what in (2, 9, 10):
            kernel.resume()
        elif what == 3 and rng.random() < 0.3:
            kernel.emergency_stop(bool(rng.random() < 0.5))
        elif what == 4 and rng.random() < 0.3:
            kernel.damp()
        elif what == 5:
            kernel.update_joints(JointState(rig.now, rig.names, np.full(len(rig.names), np.nan)), rig.now)
        elif what == 11:
            wild = rng.normal(0, 3, (2, len(rig.names)))
            kernel.update_joints(JointState(rig.now, rig.names, wild[0], effort=wild[1] * 100), rig.now)
        elif what == 12:
            scale = 10.0 ** rng.integers(-2, 3)
            kernel.operate(np.where(rng.random(len(rig.names)) < 0.3, np.nan, kernel.position + rng.normal(
                0, scale, len(rig.names))), rig.now)
        elif what == 13:
            kernel.hand_back()
        elif what == 6:
            rig.joints_every = int(rng.choice([0, 2, 2, 2, 2, 2, 5]))
        elif what == 7:
            rig.tick(late_ns=int(rng.integers(0, 19)) * MS)
        elif what == 8:
            rig.tick(late_ns=int(rng.integers(0, MS)))
    except ControlError:
        pass


@dataclass
class Outcome:
    """What became of some chunks.

    Attributes:
        violations: commands outside a limit, or counters that disagree with what was sent.
        worst: the first violation, in words.
    """

    chunks: int = 0
    accepted: int = 0
    commands: int = 0
    violations: int = 0
    worst: str = ""

    def add(self, what: str, bad) -> None:
        """Counts the true entries of `bad`."""
        count = int(np.count_nonzero(bad))
        self.violations += count
        if count and not self.worst:
            self.worst = f"{count} of {np.size(bad)}: {what}"


def play(
    seed: int, config: ControlConfig, chunks: int, ticks: int = 30, names=DRIVEN_JOINTS, capsules=None
) -> Outcome:
    """One episode of abuse; judges every stretch between re-armings.

    Args:
        ticks: at most, after each chunk.
        names: joints of the G1 that are driven.
        capsules: of these joints, to watch the distances between the robot's parts too.
    """
    rng, outcome = np.random.default_rng(seed), Outcome()
    lower, upper, *_ = Rig(config, names=names, armed=False).limits()
    rig = Rig(config, start=rng.uniform(lower, upper), settle=0.1, names=names, capsules=capsules)
    for _ in range(chunks):
        outcome.chunks += 1
        try:
            rig.kernel.accept_chunk(chunk_of(KINDS[rng.integers(len(KINDS))], rig, rng), rig.now)
            outcome.accepted += 1
        except RejectedChunk:
            pass
        for _ in range(rng.integers(1, ticks)):
            rig.tick()
        disturb(rig, rng)
        if rig.kernel.mode in (Mode.FAULT, Mode.DAMP):
            judge(rig, outcome)
            rig.joints_every = 2
            rig.kernel.emergency_stop(False)
            rig.rearm()
            rig.run(0.05)
    judge(rig, outcome)
    counters = rig.kernel.counters
    counted = counters.accepted, sum(counters.rejected.values())
    outcome.add(f"seed {seed}: counters", counted != (outcome.accepted, outcome.chunks - outcome.accepted))
    return outcome


def judge(rig: Rig, outcome: Outcome) -> None:
    """Every command since the last `forget`; a tick that made up several grid steps is judged by the time passed."""
    lower, upper, top, most, hardest = rig.limits()
    path, period = rig.path, rig.config.period
    outcome.commands += len(path)
    outcome.add("not finite", ~np.isfinite(path))
    outcome.add("position", (path < lower) | (path > upper))
    times = np.array(rig.times)
    steps = np.maximum(np.round(np.diff(times) / rig.config.period_ns), 1)
    velocity = np.diff(path, axis=0) / period
    outcome.add("step over several periods", np.abs(velocity) > top * (steps[:, None] + 1))
    # Derivatives can be told where every tick was on time.
    on_time = np.diff(times) == rig.config.period_ns
    acceleration, jerk = np.diff(velocity, axis=0) / period, np.diff(velocity, 2, axis=0) / period**2
    outcome.add("velocity", np.abs(velocity[on_time]) > top)
    outcome.add("acceleration", np.abs(acceleration[on_time[1:] & on_time[:-1]]) > most)
    outcome.add("jerk", np.abs(jerk[on_time[2:] & on_time[1:-1] & on_time[:-2]]) > hardest)
