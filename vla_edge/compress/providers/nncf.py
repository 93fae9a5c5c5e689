"""Intel's NNCF (package nncf): its weight compression, INT8 and INT4, the latter also by its AWQ with scale estimation.

It compresses traced models; each layer is made one of its own. Within a larger one, its AWQ would leave out layers that
follow no activation function, and move scales into layers that the step may not be about.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout

from vla_edge.compress.apply import weight_grid
from vla_edge.compress.providers.readback import as_numpy, in_steps, read_weight
from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.compress.steps import Quantize

METHODS = (
    ("int4", None, "rtn"),
    ("int4", None, "awq"),
    ("int8", None, "rtn"),
)
SETTINGS: frozenset[str] = frozenset()


def load():
    """The library. Raises ImportError."""
    import nncf.torch

    return nncf


def quantize(
    root, modules: Mapping[str, object], step: Quantize, run: Callable[[], None]
) -> dict[str, CompressedLinear]:
    """Quantize `modules` of `root`, whose weights are of no use afterwards.

    Args:
        root: the policy that holds all layers. modules: name -> those to quantize.
        run: shows the calibration data to `root`.
    """
    means: dict[str, list] = {name: [] for name in modules}

    def watch(name: str, args: tuple) -> None:
        # of what comes at one call, its statistics keep the mean of each channel
        means[name].append(args[0].flatten(0, -2).mean(0)[None, None])

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: watch(name, args))
        for name, module in modules.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {name: _compress(module, step, means[name]) for name, module in modules.items()}


def _compress(module, step: Quantize, calls: list) -> CompressedLinear:
    from nncf.torch.quantization.layers import BaseWeightsDecompressor, SQMultiply

    library = load()
    options = {"mode": library.CompressWeightsMode.INT8_SYM}
    if step.weights == "int4":
        awq = step.method == "awq"
        options = dict(
            mode=library.CompressWeightsMode.INT4_SYM, group_size=weight_grid(step, module.in_features)[1],
            ratio=1.0, all_layers=True, subset_size=len(calls), awq=awq, scale_estimation=awq,
        )  # fmt: skip
    library.set_log_level(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # tables and bars for each layer
        found = library.compress_weights(_alone(module), dataset=library.Dataset(calls), **options)
    (decompress,) = (part for part in found.modules() if isinstance(part, BaseWeightsDecompressor))
    scales = [as_numpy(part.scale).reshape(-1) for part in found.modules() if isinstance(part, SQMultiply)]
    weight = as_numpy(decompress(module.weight))
    steps = as_numpy(decompress._scale).reshape(len(weight), -1)
    bias = None if module.bias is None else as_numpy(module.bias)
    quantized = read_weight(in_steps(weight, steps), steps, step)
    return CompressedLinear(quantized, bias, input_scale=scales[0] if scales else None)


def _alone(linear):
    """A model of one layer."""
    from torch import nn

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            # an activation function that changes nothing, for its AWQ to find
            return self.linear(nn.functional.leaky_relu(x, 1.0))

    return Alone()
