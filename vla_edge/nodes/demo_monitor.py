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
        arrivals: s, steady clock.
        ages: s from each chunk's observation to its arrival here, in another process.
    """

    arrivals: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)


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
            self._serving = Serving()
            self.servings.append(self._serving)

    def end(self) -> None:
        """From now on they do not."""
        with self._lock:
            self._serving = None

    def joints(self) -> JointState | None:
        """The newest joint state, None before the first."""
        self._joint_stream.drain()
        return self._joints

    def chunk_rate_hz(self) -> float:
        """Chunks per second of serving, from the first chunk of each stretch to its last."""
        pairs = [(len(s.arrivals) - 1, s.arrivals[-1] - s.arrivals[0]) for s in self.servings if len(s.arrivals) > 1]
        seconds = sum(pair[1] for pair in pairs)
        return sum(pair[0] for pair in pairs) / seconds if seconds else 0.0

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
