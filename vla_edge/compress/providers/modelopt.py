"""NVIDIA ModelOpt (package nvidia-modelopt): its AWQ, SmoothQuant, INT4 and FP8, read back layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np

from vla_edge.compress.quantize.formats import FP8, number_format
from vla_edge.compress.quantize.rtn import fitting_group, round_on_grid
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear
from vla_edge.compress.steps import Quantize

# its presets; "smoothquant" is what it offers for INT8 with rounded inputs
METHODS = {
    ("int4", None, "rtn"): "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    ("int4", None, "awq"): "INT4_AWQ_CFG",
    ("int8", "int8", "rtn"): "INT8_SMOOTHQUANT_CFG",
    ("fp8", "fp8", "rtn"): "FP8_DEFAULT_CFG",
}
SETTINGS: frozenset[str] = frozenset()


def load():
    """The library. Raises ImportError."""
    import modelopt.torch.quantization

    return modelopt.torch.quantization


def quantize(
    root, modules: Mapping[str, object], step: Quantize, run: Callable[[], None]
) -> dict[str, CompressedLinear]:
    """Quantize `modules` of `root`, which is changed and of no use afterwards.

    Args:
        root: `nn.Module` that holds all layers. modules: name -> those to quantize.
        run: shows the calibration data to `root`.
    """
    load().quantize(root, configuration(root, modules, step), lambda _: run())
    return {name: _read(module, step) for name, module in modules.items()}


def configuration(root, modules: Mapping[str, object], step: Quantize) -> dict:
    """The library's preset for `step`, about `modules` of `root` and nothing else."""
    config = copy.deepcopy(getattr(load(), METHODS[step.weights, step.activations, step.method]))
    widths = {module.in_features for module in modules.values()}
    chosen = {id(module) for module in modules.values()}
    # its presets leave out layers by the names they have in language models: a "gate" is a router's there
    named = [entry for entry in config["quant_cfg"] if not entry.get("enable", True) and entry["quantizer_name"] != "*"]
    entries = config["quant_cfg"] = [entry for entry in config["quant_cfg"] if entry not in named]
    for name, module in root.named_modules():
        if name and not list(module.children()) and id(module) not in chosen:
            entries.append({"quantizer_name": f"{name}.*", "enable": False})
    if step.weights == "int4":
        # one block size for all that it is asked to do at once; a group per layer would need a call per layer
        _block_size(entries, min(fitting_group(width, step.group_size) for width in widths))
    return config


def _read(module, step: Quantize) -> CompressedLinear:
    weight = module.weight.detach().float().numpy()
    bias = None if module.bias is None else module.bias.detach().float().numpy()
    grid = number_format(step.weights)
    largest = module.weight_quantizer.amax.detach().float().numpy()
    group = None
    if step.weights == "int4":
        group = weight.size // largest.size
        steps = largest.reshape(len(weight), -1) / np.float32(grid.largest)
    else:
        steps = np.broadcast_to(largest.reshape(-1) / np.float32(grid.largest), (len(weight),)).astype(np.float32)
    steps = np.where(steps > 0, steps, np.float32(1.0))
    scale = getattr(module.input_quantizer, "pre_quant_scale", None)
    scale = None if scale is None else scale.detach().float().numpy().reshape(-1)
    return CompressedLinear(round_on_grid(weight, steps, grid, group), bias, _activation(module, step), None, scale)


def _activation(module, step: Quantize) -> ActivationQuant | None:
    if step.activations is None:
        return None
    largest = float(module.input_quantizer.amax.detach().float().max())
    if step.activations == "fp8":
        return ActivationQuant("static", largest / FP8.largest, format="fp8")
    return ActivationQuant("static", largest / 127.0, 128)  # its grid is symmetric, around our middle


def _block_size(entries: list[dict], group: int) -> None:
    for entry in entries:
        if "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"] = {**entry["cfg"]["block_sizes"], -1: group}
