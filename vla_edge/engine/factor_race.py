"""A convolution against its factors, each by the runtime that runs it fastest here, in turn."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla_edge.compress.steps import Keep, Storage
from vla_edge.engine.backends import StageInterface, gain_by_reduced_range, get_backend, reads
from vla_edge.engine.choose import choose
from vla_edge.engine.layer_latency import copies_worth, timed_layer
from vla_edge.engine.race import take_turns

ROUNDS = 15
_MOST_COPIES = 4  # as for single layers, but each is traced, which takes longer than running it


class FactorRace:
    """See `compress.pipeline.carry_out`.

    Args:
        backends: to choose from, those that do not read ONNX left out.
    """

    def __init__(self, backends: Sequence[str]):
        self._backends = [name for name in backends if reads(get_backend(name)) == ".onnx"]

    def __call__(self, convolution, factors, size: tuple[int, ...], storage: Storage) -> float:
        """Time of `factors` over that of `convolution` on (1, *size, channels), both stored as `storage` says.

        Raises:
            ExportError, BackendError: one cannot be exported, or run.
        """
        whole, thin = (_stage(module, convolution, size) for module in (convolution, factors))
        return race_of_stages(whole, thin, self._backends, storage)


def race_of_stages(whole, other, backends: Sequence[str], storage: Storage = Keep(("*",))) -> float:
    """Time of stage `other` over that of `whole`, both stored as `storage` says, each as it runs fastest: lower quartiles of
    `ROUNDS` in turn, since other load only ever adds."""
    with tempfile.TemporaryDirectory() as directory:
        laps = {}
        for name, stage in (("whole", whole), ("other", other)):
            place = Path(directory) / name
            place.mkdir()
            laps[name] = _lap(stage, storage, place, backends)
        times = take_turns(laps, ROUNDS)
    return float(np.percentile(times["other"], 25) / np.percentile(times["whole"], 25))


def _lap(stage, storage: Storage, directory: Path, backends: Sequence[str]):
    from vla_edge.engine.export import export_stage, linear_layers, trace

    ranged = gain_by_reduced_range(backends)
    layers = {name: timed_layer(module, storage, ranged) for name, module in linear_layers(stage).items()}
    file = export_stage(stage, layers, directory / "stage.onnx", trace(stage))
    interface = StageInterface(stage.name, stage.inputs, stage.outputs)
    inputs = {spec.name: np.random.default_rng(0).standard_normal(spec.shape, np.float32) for spec in stage.inputs}
    choice = choose(file, directory, interface, backends, inputs)
    loaded = get_backend(choice.backend).load(directory / choice.built.file, interface, choice.built.options)
    run = loaded.bind(inputs, {spec.name: spec.zeros() for spec in stage.outputs})

    def lap(_round: int) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return lap


def _stage(module, convolution, size: tuple[int, ...]):
    """Channels first at both ends, as runtimes have them between convolutions."""
    from torch import nn

    from vla_edge.policy.stages import Stage, TensorSpec

    around = zip(size, convolution.kernel, convolution.stride, convolution.padding, strict=True)
    places = [(length + 2 * padding - taps) // step + 1 for length, taps, step, padding in around]
    given, made = (1, convolution.inputs, *size), (1, convolution.linear.out_features, *places)
    touched = convolution.linear.weight.numel() + int(np.prod(given)) + int(np.prod(made))
    copies = min(_MOST_COPIES, copies_worth(touched))

    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(copies))

        def forward(self, *inputs):
            return tuple(layer(x.movedim(1, -1)).movedim(-1, 1) for layer, x in zip(self.copies, inputs))

    def specs(name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"{name}{i}", shape) for i in range(copies))

    return Stage("convolution", Copies().eval(), specs("x", given), specs("y", made))
