"""How smoothly a robot was commanded, above all where one chunk took over from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_edge.serve.plan import end_ns, positions_at
from vla_edge.types import NANOSECONDS, ActionChunk

DEPARTURE = 0.5
"""s after a chunk took over in which it is compared with the one before."""


@dataclass(frozen=True)
class EpisodeSmoothness:
    """One episode, in the unit of its world's joints.

    Attributes:
        plan_steps: for each chunk that took over from one that had not run out, how far the two were apart at that
            moment, the worst joint: what a controller that follows chunks as they come would jump.
        departures: for each of these, how far the two come apart from one row to the next in the `DEPARTURE` s
            after, the worst row and joint: finds a step that a policy has moved into its chunk.
        command_steps: for each of these moments, how far the command left the straight line through the two ticks
            before, the worst joint: what was left of that jump.
        jerk_rms: of the command, per s^3, over all ticks and joints.
    """

    plan_steps: tuple[float, ...]
    departures: tuple[float, ...]
    command_steps: tuple[float, ...]
    jerk_rms: float


@dataclass(frozen=True)
class SmoothnessSummary:
    """All episodes of a run; NaN where there was nothing.

    Attributes:
        boundaries: chunks that took over from a running one.
        plan_step_p99, departure_p99, command_step_p99: see `EpisodeSmoothness`.
        jerk_rms: mean over episodes.
    """

    boundaries: int
    plan_step_p99: float
    departure_p99: float
    command_step_p99: float
    jerk_rms: float

    @classmethod
    def of(cls, episodes: Sequence[EpisodeSmoothness]) -> SmoothnessSummary:
        """Over episodes."""
        plan, departures, command = (
            [step for episode in episodes for step in getattr(episode, name)]
            for name in ("plan_steps", "departures", "command_steps")
        )
        jerks = [episode.jerk_rms for episode in episodes if math.isfinite(episode.jerk_rms)]
        p99 = [float(np.percentile(steps, 99)) if steps else math.nan for steps in (plan, departures, command)]
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
        self._departures: list[float] = []
        self._switches: list[int] = []

    def add(self, command: np.ndarray) -> None:
        """(J,) told in the last tick."""
        self._commands.append(command)

    def switch(self, previous: ActionChunk | None, chunk: ActionChunk, now_ns: int) -> None:
        """`chunk` takes over from `previous` with the next tick."""
        if previous is None or now_ns >= end_ns(previous):
            return
        rows = max(1, round(DEPARTURE / chunk.dt))
        stamps = now_ns + round(chunk.dt * NANOSECONDS) * np.arange(rows + 1)
        stamps = stamps[stamps <= max(now_ns, min(end_ns(previous), end_ns(chunk)))]
        apart = positions_at(chunk, stamps) - positions_at(previous, stamps, chunk.joint_names)
        self._plan_steps.append(float(np.abs(apart[0]).max()))
        self._departures.append(float(np.abs(np.diff(apart, axis=0)).max(initial=0.0)))
        self._switches.append(len(self._commands))

    def result(self) -> EpisodeSmoothness:
        """So far."""
        commands = np.array(self._commands)
        bends = np.abs(np.diff(commands, 2, axis=0)).max(axis=1) if len(commands) > 2 else np.zeros(0)
        # bends[i] is of ticks i, i + 1, i + 2; a switch before tick k shows in the bends that end there or just after.
        steps = [bends[max(k - 2, 0) : k + 1].max() for k in self._switches if k < len(commands) and bends.size]
        jerk = np.diff(commands, 3, axis=0) / self._period**3 if len(commands) > 3 else np.full(1, math.nan)
        return EpisodeSmoothness(
            tuple(self._plan_steps),
            tuple(self._departures),
            tuple(map(float, steps)),
            float(np.sqrt(np.mean(jerk**2))),
        )
