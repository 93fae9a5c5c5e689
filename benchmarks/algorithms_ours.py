"""The side of `algorithms_task.py` that is this package's: a network as a policy in pieces, and its recipes."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from vla_edge.compress.fake import FakeLinear
from vla_edge.compress.piecewise import compress_piecewise
from vla_edge.compress.plan import plan_layers
from vla_edge.compress.recipe import Recipe, parse_recipe
from vla_edge.policy.blocks import Fold
from vla_edge.policy.chain import Chain
from vla_edge.policy.stages import Stage, TensorSpec


def compress(network, method: str) -> None:
    """Compress a `Network` in place, one block after the other, as a build does to which little memory is given."""
    source, recipe = InBlocks(network), recipe_of(method, network.group)
    plan = plan_layers(recipe, [f"network.{layer}" for layer in network.layers])
    with tempfile.TemporaryDirectory() as directory:
        layers = compress_piecewise(
            recipe, plan, source, source.calls, len(network.calibration), Path(directory), lambda *_: None
        )
        for name in layers:
            path = name.removeprefix("network.")
            weight, fake = network.model.get_submodule(path).weight.data, FakeLinear(layers[name])
            fake.weight = weight.copy_(fake.weight)  # in place, as the peers do
            network.model.set_submodule(path, fake)


def recipe_of(method: str, group: int) -> Recipe:
    """The recipe of a method of the benchmark, for all layers; 4 bits have `group` inputs per scale."""
    four = {"targets": ["*"], "weights": "int4", "group_size": group}
    name, _, pattern = method.partition("-")
    steps = {
        "rtn": [{"quantize": four}],
        "awq": [{"quantize": {**four, "method": "awq", "at_run_time": True}}],
        "gptq": [{"quantize": {**four, "method": "gptq"}}],
        "smoothquant": [
            {"smooth": {"targets": ["*"], "at_run_time": True}},
            {"quantize": {"targets": ["*"], "weights": "int8", "activations": "int8"}},
        ],
    }.get(name) or [{"prune": {"targets": ["*"], "method": name, "pattern": pattern or "unstructured"}}]
    return parse_recipe({"name": method, "steps": steps})


class Blocks(Chain):
    """The blocks of a network, under the names they have there: a piece each, which hands on what the next one reads."""

    def __init__(self, network):
        super().__init__()
        own = network.blocks.partition(".")[0]
        self.add_module(own, network.model.get_submodule(own))
        self._path, self._network = network.blocks, (network,)  # whose other parts are none of this
        self._beside: tuple[tuple, dict] = (), {}  # masks and angles, which texts of one length and all blocks share

    def folds(self):
        (network,) = self._network
        return [Fold(*fold) for fold in network.folds]

    def pieces(self):
        return tuple((f"{self._path}.{number}",) for number in range(len(self.get_submodule(self._path))))

    def piece(self, number, handed, inputs):
        (network,), blocks = self._network, self.get_submodule(self._path)
        if number == 0:
            (first, *beside), named = first_inputs(network.model, blocks[0], inputs[0])
            handed, self._beside = (first,), (beside, named)
        beside, named = self._beside
        out = blocks[number](*handed, *beside, **named)
        return (out[0] if isinstance(out, tuple) else out,), ()


class InBlocks:
    """A network as a policy of one stage, for `compress_piecewise`; all of it is in memory anyway."""

    def __init__(self, network):
        (length,) = {batch["input_ids"].shape[1] for batch in network.calibration}
        self._calibration = network.calibration
        self._stage = Stage("network", Blocks(network), (TensorSpec("input_ids", (1, length), "int64"),), ())

    @property
    def policy(self) -> InBlocks:
        return self

    def stages(self) -> tuple[Stage, ...]:
        return (self._stage,)

    def holding(self, stage: str, piece: tuple[str, ...]):
        return nullcontext()

    def calls(self, place: int, _stage: str) -> list[dict]:
        """Of an observation: the tokens of one text."""
        return [{"input_ids": self._calibration[place]["input_ids"].numpy()}]


class _Reached(Exception):
    """A block's arguments."""


def first_inputs(model: nn.Module, block: nn.Module, tokens: torch.Tensor) -> tuple[tuple, dict]:
    """What the model gives its first block, where it is left."""

    def leave(_module, arguments, named):
        raise _Reached(arguments, named)

    handle = block.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Reached as reached:
        return reached.args
    finally:
        handle.remove()
    raise RuntimeError("the first block was never reached")
