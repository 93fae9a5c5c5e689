"""How smoothly a robot was commanded, above all where one chunk took over from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_edge.serve.plan import end_ns, positions_at
from vla_edge.types import ActionChunk


@dataclass(frozen=True)
class EpisodeSmoothness:
    """One episode.

    Attributes:
        plan_steps_rad: for each chunk that took over from one that had not run out, how far the two were apart at that
            moment, the worst joint: what a controller that follows chunks as they come would jump.
        command_steps_rad: for each of these moments, how far the command left the straight line through the two ticks
            before, the worst joint: what was left of that jump.
        jerk_rms: rad/s^3 of the command, over all ticks and joints.
    """

    plan_steps_rad: tuple[float, ...]
    command_steps_rad: tuple[float, ...]
    jerk_rms: float


@dataclass(frozen=True)
class SmoothnessSummary:
    """All episodes of a run; NaN where there was nothing.

    Attributes:
        boundaries: chunks that took over from a running one.
        plan_step_p99_rad, command_step_p99_rad: see `EpisodeSmoothness`.
        jerk_rms: rad/s^3, mean over episodes.
    """

    boundaries: int
    plan_step_p99_rad: float
    command_step_p99_rad: float
    jerk_rms: float

    @classmethod
    def of(cls, episodes: Sequence[EpisodeSmoothness]) -> SmoothnessSummary:
        """Over episodes."""
        plan, command = (
            [step for episode in episodes for step in getattr(episode, name)]
            for name in ("plan_steps_rad", "command_steps_rad")
        )
        jerks = [episode.jerk_rms for episode in episodes if math.isfinite(episode.jerk_rms)]
        p99 = [float(np.percentile(steps, 99)) if steps else math.nan for steps in (plan, command)]
        return cls(len(plan), *p99, float(np.mean(jerks)) if jerks else math.nan)


class Smoothness:
    """Gathers one episode: `add` after every tick, `switch` when a chunk was accepted.

    Args:
        period: s between ticks.
    """

    def __init__(self, period: float):
        self._period = period
        self._commands: list[np.ndarray] = []
        self._plan_steps: list[float] = []
        self._switches: list[int] = []

    def add(self, command: np.ndarray) -> None:
        """(J,) rad, told in the last tick."""
        self._commands.append(command)

    def switch(self, previous: ActionChunk | None, chunk: ActionChunk, now_ns: int) -> None:
        """`chunk` takes over from `previous` with the next tick."""
        if previous is None or now_ns >= end_ns(previous):
            return
        now = np.array([now_ns])
        step = positions_at(chunk, now) - positions_at(previous, now, chunk.joint_names)
        self._plan_steps.append(float(np.abs(step).max()))
        self._switches.append(len(self._commands))

    def result(self) -> EpisodeSmoothness:
        """So far."""
        commands = np.array(self._commands)
        bends = np.abs(np.diff(commands, 2, axis=0)).max(axis=1) if len(commands) > 2 else np.zeros(0)
        # bends[i] is of ticks i, i + 1, i + 2; a switch before tick k shows in the bends that end there or just after.
        steps = [bends[max(k - 2, 0) : k + 1].max() for k in self._switches if k < len(commands) and bends.size]
        jerk = np.diff(commands, 3, axis=0) / self._period**3 if len(commands) > 3 else np.full(1, math.nan)
        return EpisodeSmoothness(
            tuple(self._plan_steps), tuple(map(float, steps)), float(np.sqrt(np.mean(jerk**2)))
        )
