"""How long each layer takes in each precision on this machine: what a budget of milliseconds is spent by.

Every distinct product (shape, rows, precision) is run alone through the fastest of the runtimes that the engine is for.
What is not a layer (attention, norms, activations, pre- and post-processing) is the rest of a whole engine in float32.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vla_edge.compress.apply import Tell, compress_layer
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear
from vla_edge.compress.steps import Keep, Quantize, Storage
from vla_edge.engine.backends import AUTO, StageInterface, chosen_backends, gain_by_reduced_range, get_backend
from vla_edge.engine.choose import choose
from vla_edge.types import Observation

_RUNS = 30
# Copies of a layer run in turns: weights have left the inner caches when their turn comes again, as in an engine, and
# what differs between precisions is mostly how long they take to come back.
_BYTES, _MOST_COPIES = 8 * 2**20, 32


@dataclass(frozen=True)
class LayerLatency:
    """Where the time of a chunk goes.

    Attributes:
        milliseconds: layer -> option -> ms of all its calls in one chunk.
        rest_ms: of a chunk, for everything that is no layer.
    """

    milliseconds: Mapping[str, Mapping[str, float]]
    rest_ms: float


def measure_layers(
    modules: Mapping[str, object],
    runner,
    observation: Observation,
    whole_ms: float,
    options: Mapping[str, Storage],
    backend: str = AUTO,
    tell: Tell = lambda fraction, what: None,
) -> LayerLatency:
    """Every layer in every precision, alone.

    Args:
        modules, runner: of a policy in PyTorch. observation: one it can be shown, which tells how often each layer runs
            and on how many rows.
        whole_ms: of a chunk by the same runtime with every layer in float32.
        options: how to store a layer; by name. backend: name or names of the runtimes to choose from, for each product.

    Raises:
        ExportError, BackendError: a layer cannot be exported, or run.
    """
    seen = _calls(modules, runner, observation)
    known: dict[tuple, float] = {}
    plain = Keep(("*",))
    with tempfile.TemporaryDirectory() as directory:
        timer = _Timer(chosen_backends(backend), Path(directory))
        found, floats = {}, 0.0
        for number, (name, module) in enumerate(modules.items()):
            tell(number / len(modules), f"timing {name}")
            rows, calls = seen[name]

            def cost(step: Storage, module=module, rows=rows, calls=calls) -> float:
                key = (module.in_features, module.out_features, module.bias is not None, rows, step)
                if calls and key not in known:
                    known[key] = timer(module, rows, step)
                return calls * known.get(key, 0.0)

            found[name] = {option: cost(step) for option, step in options.items()}
            floats += cost(plain)
    return LayerLatency(found, max(0.0, whole_ms - floats))


def _calls(modules: Mapping[str, object], runner, observation: Observation) -> dict[str, tuple[int, int]]:
    """Layer -> rows of a call, calls of one chunk. What was computed beforehand, such as flow time, is not called."""
    seen = {name: (0, 0) for name in modules}

    def count(name: str):
        def hook(module, inputs):
            seen[name] = (inputs[0].numel() // module.in_features, seen[name][1] + 1)

        return hook

    hooks = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    try:
        runner.infer(observation)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class _Timer:
    """Milliseconds of one product, as part of a longer run."""

    def __init__(self, backends: Sequence[str], directory: Path):
        self._backends, self._directory = backends, directory
        self._traced: dict[tuple, object] = {}

    def __call__(self, module, rows: int, step: Storage) -> float:
        from vla_edge.engine.export import export_stage, trace

        copies = copies_worth(module.weight.numel())
        stage = _stage(module, rows, copies)
        layer = timed_layer(module, step, gain_by_reduced_range(self._backends))
        key = (module.in_features, module.out_features, module.bias is not None, rows)
        if key not in self._traced:
            self._traced[key] = trace(stage)
        layers = {f"copies.{i}": layer for i in range(copies)}
        file = export_stage(stage, layers, self._directory / "layer.onnx", self._traced[key])
        interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        inputs = {spec.name: np.random.default_rng(0).standard_normal(spec.shape, np.float32) for spec in stage.inputs}
        choice = choose(file, self._directory, interface, self._backends, inputs)
        built = choice.built
        loaded = get_backend(choice.backend).load(self._directory / built.file, interface, built.options)
        run = loaded.bind(inputs, {spec.name: spec.zeros() for spec in stage.outputs})
        times = []
        for _ in range(_RUNS):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return 1e3 * float(np.median(times)) / copies


def copies_worth(numbers: int) -> int:
    """Of something that touches so many floats, for `_BYTES` together."""
    return min(_MOST_COPIES, -(-_BYTES // (4 * numbers)))


def timed_layer(module, step: Storage, reduce_range: bool) -> CompressedLinear:
    """An `nn.Linear` that takes as long as one that `step` has compressed: how values are chosen makes no difference."""
    if isinstance(step, Quantize):
        step = replace(
            step, method="rtn", importance=None, provider=None, low_rank=0, correct_bias=False, at_run_time=False
        )
    layer = compress_layer("layer", module, step, reduce_range=reduce_range)
    if isinstance(step, Quantize) and step.static_activations:
        zero_point = 128 if step.activations == "int8" else 0
        layer = replace(layer, activation=ActivationQuant("static", 0.05, zero_point, step.activations))
    return layer


def _stage(module, rows: int, copies: int):
    from torch import nn

    from vla_edge.policy.stages import Stage, TensorSpec

    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(copies))

        def forward(self, *inputs):
            return tuple(layer(x) for layer, x in zip(self.copies, inputs))

    def specs(name: str, width: int) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"{name}{i}", (1, rows, width)) for i in range(copies))

    return Stage("layer", Copies(), specs("x", module.in_features), specs("y", module.out_features))
