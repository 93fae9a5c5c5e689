"""What the demonstration sees of the others: chunks and their age, outcomes, diagnostics."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from vla_edge.nodes import convert, qos
from vla_edge.nodes.stream import Stream


@dataclass
class Serving:
    """The chunks that arrived in one stretch of serving.

    Attributes:
        begin, end: s, steady clock. arrivals: the same, of each chunk.
        ages: s from each chunk's observation to its arrival here, in another process.
    """

    begin: float
    end: float | None = None
    arrivals: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)

    def rate(self) -> tuple[int, float]:
        """(periods between chunks, s they took). Silence before the first and after the last counts where it is longer
        than a period: an engine that falls silent is slow, an episode that ends between two chunks is not."""
        end = self.arrivals[-1] if self.end is None and self.arrivals else self.end or self.begin
        if len(self.arrivals) < 2:
            return 0, end - self.begin
        periods = len(self.arrivals) - 1
        between = self.arrivals[-1] - self.arrivals[0]
        silences = (self.arrivals[0] - self.begin, end - self.arrivals[-1])
        return periods, between + sum(max(0.0, silence - between / periods) for silence in silences)


class Monitor:
    """Listens.

    Attributes:
        episode, outcome: newest of the simulation, as dictionaries.
        diagnostics: node name -> {key: text}, newest.
        servings: one for each stretch between `begin` and `end`.
    """

    def __init__(self, node):
        self._lock = threading.Lock()
        self._joints: JointState | None = None
        self._joint_stream = Stream(node, JointState, "joint_states", self._on_joints, qos.SENSOR)
        self._serving: Serving | None = None
        self.servings: list[Serving] = []
        self.episode: dict = {}
        self.outcome: dict = {}
        self.diagnostics: dict[str, dict[str, str]] = {}
        subscribe = node.create_subscription
        subscribe(JointTrajectory, "action_chunk", self._on_chunk, qos.CHUNK_IN)
        subscribe(String, "sim/episode", lambda m: setattr(self, "episode", json.loads(m.data)), qos.LATCHED)
        subscribe(String, "sim/outcome", lambda m: setattr(self, "outcome", json.loads(m.data)), qos.LATCHED)
        subscribe(DiagnosticArray, "/diagnostics", self._on_diagnostics, qos.DIAGNOSTICS)

    def begin(self) -> None:
        """From now on chunks count."""
        with self._lock:
            self._serving = Serving(time.monotonic())
            self.servings.append(self._serving)

    def end(self) -> None:
        """From now on they do not."""
        with self._lock:
            if self._serving is not None:
                self._serving.end = time.monotonic()
            self._serving = None

    def joints(self) -> JointState | None:
        """The newest joint state, None before the first."""
        self._joint_stream.drain()
        return self._joints

    def chunk_rate_hz(self) -> float:
        """Chunks per second of serving, over all stretches."""
        periods, seconds = map(sum, zip((0, 0.0), *(serving.rate() for serving in self.servings)))
        return periods / seconds if seconds else 0.0

    def observation_to_chunk_ms(self) -> dict[str, float]:
        """p50, p95, p99 from an observation's stamp to its chunk in this process; `n` chunks."""
        ages = [1e3 * age for serving in self.servings for age in serving.ages]
        if not ages:
            return {"n": 0}
        return {**dict(zip(("p50", "p95", "p99"), map(float, np.percentile(ages, (50, 95, 99))))), "n": len(ages)}

    def value(self, node: str, key: str) -> float | None:
        """A number of a node's diagnostics, None where it is not known."""
        try:
            return float(self.diagnostics[node][key])
        except (KeyError, ValueError):
            return None

    def pictures(self) -> int:
        """Images the VLA node has received from its cameras."""
        values = self.diagnostics.get("vla", {})
        return sum(int(count) for key, count in values.items() if key.startswith("received.camera "))

    def _on_joints(self, message: JointState, info) -> None:
        self._joints = message

    def _on_chunk(self, message: JointTrajectory) -> None:
        now, age = time.monotonic(), (time.time_ns() - convert.stamp_of(message)) / 1e9
        with self._lock:
            if self._serving is not None:
                self._serving.arrivals.append(now)
                self._serving.ages.append(age)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.diagnostics[status.name] = {pair.key: pair.value for pair in status.values}
