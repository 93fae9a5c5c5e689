"""LLM Compressor (package llmcompressor): its GPTQ, AWQ and SmoothQuant, INT4, INT8 and FP8.

Its modifiers are led through their life by hand: `oneshot` wants a language model and a data set of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vla_edge.compress.apply import weight_grid
from vla_edge.compress.fold import input_groups
from vla_edge.compress.providers.readback import as_numpy, in_steps, read_activation, read_weight
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear
from vla_edge.compress.steps import Quantize

# whether inputs are smoothed first, which is what it offers for INT8 with rounded inputs
METHODS = {
    ("int4", None, "awq"): False,
    ("int4", None, "gptq"): False,
    ("int8", None, "gptq"): False,
    ("int8", "int8", "rtn"): True,
    ("int8", "int8", "gptq"): True,
    ("fp8", "fp8", "rtn"): False,
    ("fp8", "fp8", "gptq"): False,
}
SETTINGS = frozenset({"group_size", "damping", "activation_order"})
# by default it follows a moving average of the extremes, which cuts off what only some flow steps reach
_SHARED = {"num_bits": 8, "strategy": "tensor", "observer": "static_minmax"}
_INPUTS = {
    None: None,
    "int8": {**_SHARED, "type": "int", "symmetric": False},
    "fp8": {**_SHARED, "type": "float", "symmetric": True},
}


def load():
    """The library. Raises ImportError."""
    import llmcompressor.modifiers.gptq
    import llmcompressor.modifiers.quantization
    import llmcompressor.modifiers.transform

    return llmcompressor.modifiers


def quantize(
    root, modules: Mapping[str, object], step: Quantize, run: Callable[[], None]
) -> dict[str, CompressedLinear]:
    """Quantize `modules` of `root`, which is changed and of no use afterwards.

    Args:
        root: the policy that holds all layers. modules: name -> those to quantize.
        run: shows the calibration data to `root`.
    """
    library = load()
    paths = {id(module): path for path, module in root.named_modules()}
    names = {name: paths[id(module)] for name, module in modules.items()}
    schemes = _schemes(modules, names, step)
    if step.method == "gptq":
        order = "static" if step.activation_order else None
        rounding = library.gptq.GPTQModifier(config_groups=schemes, dampening_frac=step.damping, actorder=order)
    else:
        rounding = library.quantization.QuantizationModifier(config_groups=schemes)
    scales: dict[str, object] = {}
    if step.method == "awq":
        from llmcompressor.modifiers.transform.awq import AWQMapping

        # it judges by the output of what holds all readers, which in our stages nobody calls; so each is its own
        scales, mappings = _scaled(root, modules, names, [(name,) for name in modules])
        mappings = [AWQMapping(maker, readers) for maker, readers in mappings]
        _calibrate(root, [library.transform.AWQModifier(mappings=mappings), rounding], run)
    else:
        if METHODS[step.weights, step.activations, step.method]:
            scales, mappings = _scaled(root, modules, names, _read_together(root, modules))
            mappings = [(readers, maker) for maker, readers in mappings]

            def with_zeros() -> None:
                # it goes by how far a channel varies; one that holds still, as of a time's code, would be blown up
                for scale in dict.fromkeys(scales.values()):
                    scale(scale.weight.new_zeros(1, len(scale.weight)))
                run()

            _calibrate(root, [library.transform.SmoothQuantModifier(mappings=mappings)], with_zeros)
        _calibrate(root, [rounding], run)
    return {name: _read(module, step, scales.get(name)) for name, module in modules.items()}


def _calibrate(root, modifiers: Sequence, run: Callable[[], None]) -> None:
    """One pass over the data that `modifiers` look at together."""
    import torch
    from llmcompressor.core import State
    from llmcompressor.core.state import Data
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.utils.helpers import DisableQuantization

    if not torch.accelerator.is_available():  # it pins memory for a device that is not there
        IntermediatesCache.pin_memory = lambda *_: None
    state = State(model=root, data=Data(calib=()))  # some ask whether there are any
    for modifier in modifiers:
        modifier.initialize(state)
    for modifier in modifiers:
        modifier.on_calibration_start(state, None)
    with DisableQuantization(root):
        run()
    for modifier in modifiers:
        modifier.on_sequential_epoch_end(state, None, modules=list(root.modules()))
    for modifier in modifiers:
        modifier.on_calibration_end(state, None)


def _schemes(modules: Mapping[str, object], names: Mapping[str, str], step: Quantize) -> dict:
    """Its configuration: layers by the size of their groups."""
    groups: dict[int | None, list[str]] = {}
    for name, module in modules.items():
        groups.setdefault(weight_grid(step, module.in_features)[1], []).append(names[name])
    kind = {"type": "float" if step.weights == "fp8" else "int", "num_bits": 4 if step.weights == "int4" else 8}
    schemes = {}
    for group, targets in groups.items():
        shared = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
        weights = {**kind, "symmetric": True, **shared}
        schemes[str(group)] = {"targets": targets, "weights": weights, "input_activations": _INPUTS[step.activations]}
    return schemes


def _read_together(root, modules: Mapping[str, object]) -> list[tuple[str, ...]]:
    from vla_edge.engine.trace import policy_layers

    stages = root.stages()
    groups = [tuple(n for n in group.names if n in modules) for group in input_groups(policy_layers(stages), stages)]
    return [group for group in groups if group]


def _scaled(
    root, modules: Mapping[str, object], names: Mapping[str, str], groups: Sequence[tuple[str, ...]]
) -> tuple[dict[str, object], list[tuple[str, list[str]]]]:
    """Give each group of layers a scale of ones before them, for the library to find.

    What makes the tensor they read is left alone: this is a copy of the policy, and the norms of ours stay.

    Returns: name -> scale; and for each group the scale's path and the layers' paths.
    """
    import torch

    class Scale(torch.nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(width), requires_grad=False)

        def forward(self, x):
            return x * self.weight

        def before(self, _, args, named):  # its searches name the argument
            return (self(*args, *named.values()),), {}

    holder = torch.nn.ModuleList(Scale(modules[group[0]].in_features) for group in groups)
    root.add_module("input_scales", holder)
    scales: dict[str, object] = {}
    for scale, group in zip(holder, groups):
        for name in group:
            modules[name].register_forward_pre_hook(scale.before, with_kwargs=True)
            scales[name] = scale
    return scales, [(f"input_scales.{number}", [names[n] for n in group]) for number, group in enumerate(groups)]


def _read(module, step: Quantize, scale) -> CompressedLinear:
    weight, steps = as_numpy(module.weight), as_numpy(module.weight_scale)
    bias = None if module.bias is None else as_numpy(module.bias)
    activation = None
    if step.activations == "int8":
        activation = read_activation(module.input_scale, module.input_zero_point, -128)
    elif step.activations == "fp8":
        activation = ActivationQuant("static", float(module.input_scale), format="fp8")
    return CompressedLinear(
        read_weight(in_steps(weight, steps), steps, step),
        bias,
        activation,
        None,
        None if scale is None else as_numpy(scale.weight),
    )
