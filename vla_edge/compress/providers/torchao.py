"""PyTorch's torchao (package torchao): INT4 and INT8 weights by `quantize_`, INT8 with rounded inputs by PT2E, and
training through its fake quantizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from vla_edge.compress.apply import weight_grid
from vla_edge.compress.providers.readback import as_numpy, read_activation, read_weight
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear
from vla_edge.compress.recipe import RecipeError
from vla_edge.compress.steps import Quantize
from vla_edge.learn.constrained import ConstrainedLinear

# its own rounding to nearest throughout; it finds the ranges of static inputs by a search over histograms
METHODS = (
    ("int4", None, "rtn"),
    ("int8", None, "rtn"),
    ("int8", "int8", "rtn"),
    ("int8", "int8-dynamic", "rtn"),
)
SETTINGS: frozenset[str] = frozenset()


def load():
    """The library. Raises ImportError."""
    import torchao.quantization

    return torchao.quantization


def quantize(
    root, modules: Mapping[str, object], step: Quantize, run: Callable[[], None]
) -> dict[str, CompressedLinear]:
    """Quantize `modules` of `root`, which is changed and of no use afterwards.

    Args:
        root: the policy that holds all layers. modules: name -> those to quantize.
        run: shows the calibration data to `root`.
    """
    if step.activations is None:
        return {name: _read_tensor(_rounded(module, step), module.bias, step) for name, module in modules.items()}
    return _by_graph(root, modules, step, run)


def _rounded(module, step: Quantize):
    """Its tensor in the place of the layer's weight: `qdata` and `scale`."""
    load().quantize_(module, weight_config(step, module.in_features))
    return module.weight


def weight_config(step: Quantize, columns: int):
    """Its configuration for a layer of `columns` inputs."""
    library, (_, group) = load(), weight_grid(step, columns)
    kind = getattr(torch, step.weights)
    shared = library.PerAxis(0) if group is None else library.PerGroup(group)
    return library.IntxWeightOnlyConfig(weight_dtype=kind, granularity=shared)


def _read_tensor(tensor, bias, step: Quantize) -> CompressedLinear:
    weight = read_weight(as_numpy(tensor.qdata), as_numpy(tensor.scale).reshape(len(tensor), -1), step)
    return CompressedLinear(weight, None if bias is None else as_numpy(bias))


def _by_graph(root, modules, step: Quantize, run: Callable[[], None]) -> dict[str, CompressedLinear]:
    """The way of PyTorch 2 export: each stage becomes a graph, which watches what the stage is shown."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=step.activations == "int8-dynamic")
    graphs, hooks = {}, []
    for stage in root.stages():
        names = [name for name in modules if name.partition(".")[0] == stage.name]
        if not names:
            continue
        quantizer = x86.X86InductorQuantizer()
        for name in names:
            quantizer.set_module_name_qconfig(name.partition(".")[2], config)
        example = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in stage.inputs)
        graph = graphs[stage.name] = prepare_pt2e(torch.export.export(stage.module, example).module(), quantizer)

        def watch(_, args, graph=graph) -> None:
            graph(*args)

        hooks.append(stage.module.register_forward_pre_hook(watch))
    run()
    for hook in hooks:
        hook.remove()
    layers: dict[str, CompressedLinear] = {}
    for stage, graph in graphs.items():
        layers |= _read_graph(stage, convert_pt2e(graph), modules, step)
    for name in modules:
        if name not in layers:
            raise RecipeError(f"PT2E's graph of the policy has no layer {name}; leave that layer out")
    return layers


def _read_graph(stage: str, graph, modules, step: Quantize) -> dict[str, CompressedLinear]:
    layers: dict[str, CompressedLinear] = {}
    for node in graph.graph.nodes:
        if node.target != torch.ops.aten.linear.default:
            continue
        path, _ = list(node.meta["nn_module_stack"].values())[-1]
        name = f"{stage}.{path}"
        if name not in modules:
            continue
        seen, dequantized = node.args[:2]
        values, steps = (as_numpy(getattr(graph, part.target)) for part in dequantized.args[:2])
        activation = ActivationQuant("dynamic")
        if step.activations == "int8":
            _, scale, zero, lowest = seen.args[:4]
            activation = read_activation(scale, zero, lowest)
        if name in layers and layers[name].activation != activation:
            raise RecipeError(
                f"PT2E rounds the inputs of {name} differently at each of its calls; leave that layer out"
            )
        bias = modules[name].bias
        weight = read_weight(values, np.reshape(steps, (-1, 1)), step)
        layers[name] = CompressedLinear(weight, None if bias is None else as_numpy(bias), activation)
    return layers


class FakeQuantized(ConstrainedLinear):
    """A layer that trains through torchao's fake quantizer: steps follow the weights."""

    def __init__(self, step: Quantize, linear, layer: CompressedLinear, pruned: bool):
        from torchao.quantization.qat import IntxFakeQuantizeConfig
        from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

        super().__init__(linear, layer, pruned)
        self.step = step
        group = weight_grid(step, linear.in_features)[1]
        shared = {"granularity": "per_channel"} if group is None else {"group_size": group}
        config = IntxFakeQuantizeConfig(getattr(torch, step.weights), **shared, is_symmetric=True)
        self.quantizer = FakeQuantizerBase.from_config(config)
        with torch.no_grad():
            self.weight.copy_(linear.weight)

    def seen(self):
        """(out, in) weights that the product is made with."""
        return self.quantizer(self.weight if self.stays is None else self.weight * self.stays)

    def compressed(self) -> CompressedLinear:
        """The layer with the weights and steps that training found."""
        linear = torch.nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight.data.copy_(self.weight if self.stays is None else self.weight * self.stays)
        return _read_tensor(_rounded(linear, self.step), self.bias, self.step)


def trainable(step: Quantize):
    """The class through which layers of `step` train, None for our own; PT2E's would train its graphs."""
    return None if step.activations else lambda *given: FakeQuantized(step, *given)
