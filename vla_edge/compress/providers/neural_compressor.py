"""Intel's Neural Compressor (package neural-compressor-pt): its rounding to nearest and GPTQ, INT4 and INT8.

GPTQ is led layer by layer: its entry points want a language model's blocks, called in turn. For the same reason its AWQ
and TEQ are not offered; its static INT8 is torchao's PT2E.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vla_edge.compress.apply import weight_grid
from vla_edge.compress.providers.readback import as_numpy, in_steps, read_weight
from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.compress.steps import Quantize

METHODS = (
    ("int4", None, "rtn"),
    ("int4", None, "gptq"),
    ("int8", None, "rtn"),
    ("int8", None, "gptq"),
)
SETTINGS = frozenset({"group_size", "damping"})
_WHOLE = -1  # its word for one group


def load():
    """The library. Raises ImportError."""
    import neural_compressor.torch.algorithms.weight_only.gptq
    import neural_compressor.torch.algorithms.weight_only.utility

    return neural_compressor.torch.algorithms.weight_only


def quantize(
    root, modules: Mapping[str, object], step: Quantize, run: Callable[[], None]
) -> dict[str, CompressedLinear]:
    """Quantize `modules` of `root`, whose weights are of no use afterwards.

    Args:
        root: the policy that holds all layers. modules: name -> those to quantize.
        run: shows the calibration data to `root`.
    """
    if step.method == "rtn":
        return {name: _round(module, step) for name, module in modules.items()}
    library = load()
    tasks = {name: library.gptq.GPTQ(module, module.weight) for name, module in modules.items()}
    hooks = [
        module.register_forward_hook(lambda _, args, out, task=tasks[name]: task.add_batch(args[0], out))
        for name, module in modules.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {name: _make_up(module, tasks[name], step) for name, module in modules.items()}


def _round(module, step: Quantize) -> CompressedLinear:
    values, steps, _ = load().utility.quant_tensor(
        module.weight.detach(), _bits(step), _group(module, step), scheme="sym", return_int=True
    )
    return _layer(module, as_numpy(values), as_numpy(steps), step)


def _make_up(module, task, step: Quantize) -> CompressedLinear:
    task.quantizer.configure(
        {"dtype": "int", "bits": _bits(step), "sym": True, "double_quant_sym": True, "use_double_quant": False,
         "perchannel": True, "mse": False}
    )  # fmt: skip
    steps, _, _, weight = task.fasterquant(
        module.weight.detach().clone(), percdamp=step.damping, groupsize=_group(module, step)
    )
    weight, steps = as_numpy(weight), as_numpy(steps)
    return _layer(module, in_steps(weight, steps), steps, step)


def _layer(module, points, steps, step: Quantize) -> CompressedLinear:
    return CompressedLinear(read_weight(points, steps, step), None if module.bias is None else as_numpy(module.bias))


def _bits(step: Quantize) -> int:
    return 4 if step.weights == "int4" else 8


def _group(module, step: Quantize) -> int:
    return weight_grid(step, module.in_features)[1] or _WHOLE
