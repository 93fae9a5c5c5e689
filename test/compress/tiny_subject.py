"""The tiny policy of test/engine, taken apart for compression."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from vla_edge.compress.apply import compress_policy
from vla_edge.compress.importance import weighed_inputs
from vla_edge.compress.plan import plan_layers
from vla_edge.compress.recipe import parse_recipe
from vla_edge.engine.runner import Runner
from vla_edge.engine.trace import policy_layers
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.checkpoint_writer import write_checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))
from tiny import WORDS, make_observations, tiny_policy, tiny_spec  # noqa: E402

ROWS, COLUMNS = 48, 96
"""Of the layer with difficult inputs, see conftest."""


def load_tiny(directory: Path):
    """(policy, checkpoint), written to and read from `directory`."""
    checkpoint = load_checkpoint(write_checkpoint(directory / "checkpoint", tiny_policy(), tiny_spec(), WORDS))
    return load_policy(checkpoint), checkpoint


class Subject:
    """A policy with its layers and a runner over them."""

    def __init__(self, policy, checkpoint):
        self.policy, self.checkpoint, self.stages = policy, checkpoint, policy.stages()
        self.modules = policy_layers(self.stages)
        self.runner = Runner.from_policy(policy, checkpoint)

    def chunks(self) -> np.ndarray:
        self.runner.set_num_steps(self.runner.num_steps)
        return np.array([self.runner.infer(o, seed=3).chunk.positions for o in make_observations(4, seed=9)])

    def weighed(self, observations):
        return lambda groups, progress: weighed_inputs(self.policy, self.checkpoint, groups, observations, progress)

    def compress(self, *steps, observations=6, **options):
        recipe = parse_recipe({"name": "test", "steps": list(steps)})
        plan = plan_layers(recipe, list(self.modules))
        seen = make_observations(observations)
        return compress_policy(
            recipe, plan, self.modules, self.stages, self.runner, seen, lambda *_: None,
            weighed=self.weighed(seen), **options,
        )  # fmt: skip
