"""What the VLA node says about itself: whether it serves, how fast each stage is, and what it refused."""

from __future__ import annotations

import time

from vla_edge.nodes.engine_choice import EngineChoice
from vla_edge.nodes.health import Health, Level, latency_values
from vla_edge.nodes.inputs import ObservationInputs
from vla_edge.observe.align import Aligner, Readiness
from vla_edge.serve.inference_loop import InferenceLoop
from vla_edge.serve.server import ChunkServer


class VlaStatus:
    """Gathers figures of the parts and publishes them.

    Args:
        rate: chunks per second that are asked for.
    """

    def __init__(
        self, node, server: ChunkServer, loop: InferenceLoop, inputs: ObservationInputs, aligner: Aligner,
        engines: EngineChoice, rate: float,
    ):
        self._server, self._loop, self._inputs, self._aligner, self._rate = server, loop, inputs, aligner, rate
        self._engines, self._logger = engines, node.get_logger()
        self._health = Health(node, str(server.engine.description().get("name", "")))
        self._before = (time.monotonic(), 0)

    def destroy(self) -> None:
        """Takes the publishers back."""
        self._health.destroy()

    def report(self, active: bool, inference: str) -> None:
        """Says it now.

        Args:
            inference: policy that serves, as the parameter names it.
        """
        loop, now = self._loop, time.monotonic()
        (before, chunks), self._before = self._before, (now, loop.chunks)
        rate = (loop.chunks - chunks) / (now - before)
        alignment, stages = loop.state, loop.stages.summaries()
        values = {
            "state": alignment.readiness.value, "serving": loop.running, "inference": inference,
            "chunks": loop.chunks, "rate_hz": rate,
            **latency_values("delay", self._server.delay.summary()),
            **latency_values("observation_to_chunk", loop.arrival_to_chunk.summary()),
            **latency_values("overhead", loop.overhead.summary()),
            **latency_values("overhead_from_stamp", loop.from_stamp.summary()),
            **latency_values("waited", loop.waited.summary()),
        }
        for stage, summary in stages.items():
            values |= latency_values(f"stage.{stage}", summary)
        if loop.passes:
            values |= {"decoding.passes": loop.passes, "decoding.tokens_per_pass": loop.decoded / loop.passes}
        values |= {f"age.{source}": age for source, age in self._aligner.ages(time.monotonic_ns()).items()}
        values |= {what.replace(" ", ".", 1): count for what, count in self._aligner.counts.items()}
        values |= {f"received.{source}": count for source, count in self._inputs.received.items()}
        values |= {f"rejected.{source}": count for source, count in self._inputs.rejected.items()}
        values |= {
            "rejected.observations": loop.refused.total() + self._aligner.rejected.total(),
            "dropped.chunks": loop.unwanted,
            "last_problem": self._inputs.last_problem,
            **{f"engine.{key}": value for key, value in self._server.engine.description().items()},
            **self._engines.values(),
        }
        if not loop.running:
            self._health.publish(Level.OK, "stopped" if active else "not active", values)
        elif alignment.readiness is not Readiness.READY:
            self._health.publish(Level.WARN, alignment.reason, values)
        elif "engine" in stages and stages["engine"].p95 > 1.0 / self._rate:
            late = f"the engine needs {1e3 * stages['engine'].p95:.0f} ms, longer than a period"
            self._logger.warning(late, throttle_duration_sec=30.0)
            self._health.publish(Level.WARN, late, values)
        elif self._engines.derated:
            self._health.publish(Level.WARN, f"a lighter engine serves: {self._engines.derated}", values)
        else:
            self._health.publish(Level.OK, f"{rate:.1f} chunks/s", values)
