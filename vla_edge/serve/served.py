"""An engine and its inference policy as one, for what runs over recordings: each chunk is the one that would have been
published for its observation."""

from __future__ import annotations

import numpy as np

from vla_edge.engine.runner import Inference
from vla_edge.serve.policies import make_policy
from vla_edge.serve.server import ChunkServer
from vla_edge.types import NANOSECONDS, Observation


class ServedEngine:
    """Stands where `evaluate.replay` wants an engine.

    Args:
        engine: `engine.runner.Runner`, or what behaves like one.
        inference: policy as `make_policy` reads it.
        delay_s: s from an observation's stamp to its chunk, for policies that ask.

    Raises:
        InferencePolicyError: there is no such policy.
    """

    def __init__(self, engine, inference: str, delay_s: float = 0.1):
        self._engine, self._inference, self._policy = engine, inference, make_policy(inference)
        self._delay_ns = round(delay_s * NANOSECONDS)
        self._server: ChunkServer | None = None
        self._seed: int | None = None
        self.spec = engine.spec

    def infer(self, observation: Observation, seed: int = 0, noise: np.ndarray | None = None):
        """As the engine's; observations come in the order of their stamps.

        Raises:
            ValueError: noise was given: it is the engine's own that a robot would have drawn.
        """
        if noise is not None:
            raise ValueError("a served engine draws its own noise; give the noise to the engine itself")
        if self._server is None or seed != self._seed:
            self._server, self._seed = ChunkServer(self._engine, self._policy, seed), seed
        chunk, timing = self._server.infer(observation)
        return Inference(self._server.deliver(chunk, observation.stamp_ns + self._delay_ns), timing)

    def warm_up(self) -> None:
        """As the engine's."""
        self._engine.warm_up()

    def description(self) -> dict:
        """As the engine's, with the inference policy."""
        return {**self._engine.description(), "inference": self._inference}
