"""Which engine a node serves: the one its parameter names, exchanged when that changes, or a lighter one while it must."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from vla_edge.engine.bundle import Bundle
from vla_edge.serve.derating import Derating, DeratingConfig
from vla_edge.serve.heat import Heat, HeatSensors
from vla_edge.serve.inference_loop import InferenceLoop
from vla_edge.serve.server import ChunkServer
from vla_edge.serve.swap import EngineSwap, check_alike


class EngineChoice:
    """Steps a ladder of engines up and down.

    Args:
        logger: of the node.
        loop, server: that serve.
        open_engine: path -> engine, see `EngineSwap`.
        bundle: path of the engine that serves.
        lighter: paths of bundles to step down to, lightest last. All are checked here.
        rate: chunks per second asked for.
        config: when to step.

    Raises:
        BundleError, SwapError: a lighter bundle is damaged, or made for another robot.
    """

    def __init__(
        self, logger, loop: InferenceLoop, server: ChunkServer, open_engine: Callable[[str], object], bundle: str,
        lighter: list[str], rate: float, config: DeratingConfig,
    ):
        for path in lighter:
            check_alike(server.engine.spec, Bundle.load(path).spec)
        self._logger, self._loop, self._rate, self._config = logger, loop, rate, config
        self._lighter = list(lighter)
        self._swap = EngineSwap(server, open_engine, bundle, self._done)
        self._sensors = HeatSensors()
        self.heat = Heat()
        self._begin(bundle)

    def update(self, bundle: str) -> None:
        """Looks at load and heat, and at which bundle is asked for now."""
        self.heat = self._sensors.read()
        if bundle != self._asked:
            self._begin(bundle)
            self._swap.request(bundle)
        elif not self._swap.busy:
            before, load = self._derating.level, self._loop.recent_engine.summary().p95 * self._rate
            level = self._derating.update(time.monotonic(), load if self._loop.running else math.nan, self.heat)
            if level != before:
                self._logger.warning(f"engine {level} of {len(self._lighter)}: {self._derating.reason or 'relaxed'}")
                self._swap.request(self._ladder[level])

    def values(self) -> dict[str, object]:
        """For the diagnostics."""
        heat = self.heat
        return {
            "engine.path": self._swap.serving,
            "engine.swap": self._swap.state,
            "engine.level": self._derating.level,
            "engine.derated": self._derating.reason,
            "heat.celsius": "" if heat.celsius is None else heat.celsius,
            "heat.sensor": heat.sensor,
            "heat.throttled": heat.throttled,
        }

    @property
    def derated(self) -> str:
        """Why a lighter engine serves; empty when none does."""
        return self._derating.reason

    def close(self) -> None:
        """Ends what runs beside the node."""
        self._swap.join(10.0)
        self._sensors.close()

    def _begin(self, bundle: str) -> None:
        self._asked, self._ladder = bundle, [bundle, *self._lighter]
        self._derating = Derating(self._config, len(self._ladder))

    def _done(self, path: str, problem: str) -> None:
        if problem:
            sentence = f"engine {path} is not taken, the old one goes on: {problem}"
            self._logger.error(sentence, throttle_duration_sec=10.0)
            if self._swap.serving in self._ladder:
                self._derating.resume(self._ladder.index(self._swap.serving))
        else:
            self._logger.info(f"serving {path}")
            self._loop.forget_timing()
