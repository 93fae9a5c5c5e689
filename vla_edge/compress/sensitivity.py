"""How far each layer's precision moves the robot: one layer at a time is compressed, and the chunks are compared.

The error is that of the whole policy's action chunk after all flow steps, in rad, from the same noise; not a layer's
output error, and not a language model's perplexity. `mixed.choose` makes a recipe of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vla_edge.compress.apply import Tell, Weighed, compress_layer
from vla_edge.compress.fake import installed
from vla_edge.compress.fold import input_groups
from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.compress.recipe import RecipeError
from vla_edge.compress.steps import Keep, Quantize, Storage
from vla_edge.evaluate.metrics import MotionScale
from vla_edge.evaluate.page import write_text
from vla_edge.policy.preprocess import positions_by_name
from vla_edge.types import Observation, VlaEdgeError

EVERYTHING = ("*",)
OPTIONS: dict[str, Storage] = {
    "int4-128": Quantize(EVERYTHING, "int4", method="gptq", importance="action", group_size=128),
    "int4": Quantize(EVERYTHING, "int4", method="gptq", importance="action", group_size=64),
    "int8": Quantize(EVERYTHING, "int8", method="gptq", importance="action"),
    "float16": Keep(EVERYTHING, "float16"),
}
"""Precisions to choose from by name, coarsest first."""

FAST_OPTIONS: dict[str, Storage] = {
    "int4": OPTIONS["int4"],
    "int8-dynamic": Quantize(EVERYTHING, "int8", "int8-dynamic", "gptq", "action", reduce_range="auto"),
    "int8": OPTIONS["int8"],
    "float32": Keep(EVERYTHING),
}
"""Those to choose from under a budget of time."""


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        motion_std_rad: standard deviation of the motion over the observations, rad.
        frames: observations used.
        error_rad: layer -> option -> mean absolute difference of the chunks when that layer alone is compressed, rad.
        bits: layer -> option -> bits on disk, scales included. weights: layer -> number of weights.
        milliseconds: layer -> option -> ms of a chunk, where they were measured. rest_ms: of a chunk, no layer's.
    """

    motion_std_rad: float
    frames: int
    error_rad: Mapping[str, Mapping[str, float]]
    bits: Mapping[str, Mapping[str, int]]
    weights: Mapping[str, int]
    milliseconds: Mapping[str, Mapping[str, float]] | None = None
    rest_ms: float = 0.0

    def to_dict(self) -> dict:
        """Plain types."""
        return asdict(self)


def measure(
    stages: Sequence,
    modules: Mapping[str, object],
    runner,
    weighed: Weighed,
    observations: Sequence[Observation],
    options: Mapping[str, Storage] = OPTIONS,
    tell: Tell = lambda fraction, what: None,
    progress_file: Path | None = None,
    reduce_range: bool = False,
) -> Sensitivity:
    """Every layer in every precision.

    Args:
        stages, modules, runner: a policy in PyTorch, as for `compress_policy`; it is left as it was.
        weighed: of what weights are rounded by, as for `compress_policy`. observations: what the error is measured on.
        progress_file: results so far, from which an interrupted run of the same question goes on.
        reduce_range: what `reduce_range: auto` means on the machine the engine is for.

    Raises:
        RecipeError: an option fixes the grid of activations or rescales channels, which needs more than one layer.
        CalibrationError: data that are not finite.
    """
    for name, step in options.items():
        if isinstance(step, Quantize) and (step.static_activations or step.scales_channels):
            raise RecipeError(
                f"option {name} is not about one layer alone; sensitivity takes rtn and gptq, and inputs as they come"
            )
    groups = input_groups(modules, stages)
    seen = weighed(
        {group.names[0]: [modules[name] for name in group.names] for group in groups},
        lambda f: tell(0.2 * f, "recording what reaches the layers"),
    )
    statistics = {name: seen[group.names[0]] for group in groups for name in group.names}
    trial = Trial(runner, modules, observations)
    known = _Known(progress_file, _question(trial, modules, options))
    errors: dict[str, dict[str, float]] = {}
    bits: dict[str, dict[str, int]] = {}
    for number, (name, module) in enumerate(modules.items()):
        tell(0.2 + 0.8 * number / len(modules), f"measuring {name}")
        errors[name], bits[name] = {}, {}
        for option, step in options.items():
            layer = compress_layer(name, module, step, statistics=statistics[name], reduce_range=reduce_range)
            bits[name][option] = 8 * layer.nbytes
            errors[name][option] = known.get((name, option), lambda layer=layer: trial.error_rad({name: layer}))
    weights = {name: module.weight.numel() for name, module in modules.items()}
    return Sensitivity(trial.motion_std_rad, len(observations), errors, bits, weights)


class Trial:
    """The policy with some layers compressed, against itself without.

    Args:
        runner: a `Runner` in PyTorch whose stages contain `modules`.

    Attributes:
        motion_std_rad: standard deviation of the policy's motion over the observations, rad.
    """

    def __init__(self, runner, modules: Mapping[str, object], observations: Sequence[Observation]):
        if not observations:
            raise VlaEdgeError("there are no observations to measure an error on")
        self._runner, self._modules, self._observations = runner, modules, observations
        self._reference = [self._chunk(observation) for observation in observations]
        scale = MotionScale()
        for observation, chunk in zip(observations, self._reference):
            scale.add(chunk, positions_by_name(observation.joints, runner.spec.joint_names))
        self.motion_std_rad = scale.std()
        self.fingerprint = hashlib.sha256(np.array(self._reference).tobytes()).hexdigest()

    def error_rad(self, layers: Mapping[str, CompressedLinear]) -> float:
        """Mean absolute difference of the chunks with these layers in place of the policy's own, rad."""
        with self._installed(layers):
            chunks = [self._chunk(observation) for observation in self._observations]
        return float(np.mean([np.abs(ours - theirs).mean() for ours, theirs in zip(chunks, self._reference)]))

    def _chunk(self, observation: Observation) -> np.ndarray:
        return self._runner.infer(observation, seed=0).chunk.positions

    @contextmanager
    def _installed(self, layers: Mapping[str, CompressedLinear]):
        timed = any(name.startswith("time.") for name in layers)
        with installed(self._modules, layers):
            if timed:  # what depends on time alone was computed beforehand
                self._runner.set_num_steps(self._runner.num_steps)
            yield
        if timed:
            self._runner.set_num_steps(self._runner.num_steps)


class _Known:
    """Results so far, kept in a file after each one."""

    def __init__(self, path: Path | None, question: str):
        self._path, self._question, self._values = path, question, {}
        if path is not None and path.is_file():
            try:
                plain = json.loads(path.read_text(encoding="utf-8"))
                if plain["question"] == question:
                    self._values = plain["values"]
            except (ValueError, KeyError, TypeError):
                pass  # not ours, or cut off: measured anew

    def get(self, key: tuple[str, str], work: Callable[[], float]) -> float:
        name = " ".join(key)
        if name not in self._values:
            self._values[name] = work()
            if self._path is not None:
                write_text(self._path, json.dumps({"question": self._question, "values": self._values}))
        return self._values[name]


def _question(trial: Trial, modules: Mapping[str, object], options) -> str:
    """What the results depend on: the policy's answers, and how its layers would be compressed."""
    parts = [trial.fingerprint, list(modules), {name: [step.key, asdict(step)] for name, step in options.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
