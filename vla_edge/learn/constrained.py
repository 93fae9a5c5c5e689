"""Training under what a recipe has decided: weights stay zero where they were pruned, and are seen as their grid shows
them (quantization-aware training; straight-through estimator of Bengio et al., 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.compress.fake import round_inputs
from vla_edge.compress.quantize.weights import CompressedLinear, QuantizedWeight

# Of half a step: how far from the middle of its cell a weight may start, so that no rounding of the start is undone.
_WITHIN = 0.9


class ConstrainedLinear(nn.Linear):
    """An `nn.Linear` whose output is that of its compressed layer, and whose weights train as if nothing was rounded.

    Args:
        linear: as it was before rounding. layer: what became of it. pruned: whether its zeros stay.
    """

    def __init__(self, linear: nn.Linear, layer: CompressedLinear, pruned: bool):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None or layer.bias is not None)
        self.layer = layer
        weight = linear.weight.detach()
        if layer.input_scale is not None:
            self.register_buffer("input_scale", torch.from_numpy(np.array(layer.input_scale)), persistent=False)
            weight = weight / self.input_scale
        if layer.quantized:
            rounded = torch.from_numpy(layer.weight.dequantize())
            branch = 0.0 if layer.low_rank is None else torch.from_numpy(layer.low_rank.dequantize())
            if layer.input_scale is not None:
                branch = branch / self.input_scale
            rows = layer.weight.steps.reshape(len(rounded), -1)
            steps = torch.from_numpy(np.repeat(rows, rounded.shape[1] // rows.shape[1], axis=1))
            away = (_WITHIN / 2) * (1.0 if layer.weight.grid.is_integer else 0.1) * steps.abs()
            weight = rounded + (weight - branch - rounded).clamp(-away, away)
            self.register_buffer("steps", steps, persistent=False)
        if layer.low_rank is not None:
            self.register_buffer("branch", torch.from_numpy(layer.low_rank.dequantize()), persistent=False)
        self.register_buffer("stays", (weight != 0).float() if pruned else None, persistent=False)
        with torch.no_grad():
            self.weight.copy_(weight)
            if self.bias is not None:
                self.bias.copy_(torch.zeros(()) if layer.bias is None else torch.from_numpy(np.array(layer.bias)))

    def forward(self, x: Tensor) -> Tensor:
        activation, out = self.layer.activation, 0.0
        if self.layer.low_rank is not None:
            out = F.linear(x, self.branch)
        if self.layer.input_scale is not None:
            x = x * self.input_scale
        if activation is not None:
            x = x + (round_inputs(x, activation) - x).detach()
        return F.linear(x, self.seen(), self.bias) + out

    def seen(self) -> Tensor:
        """(out, in) weights that the product is made with."""
        weight = self.weight if self.stays is None else self.weight * self.stays
        if not self.layer.quantized:
            return weight
        grid = self.layer.weight.grid
        inside = (weight / self.steps).clamp(grid.smallest, grid.largest)
        rounded = grid.nearest_(inside.detach().clone())
        return (inside + (rounded - inside).detach()) * self.steps

    def plain(self) -> nn.Linear:
        """As it is now, without what kept it to its constraints."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        with torch.no_grad():
            weight = self.seen() if self.layer.input_scale is None else self.seen() * self.input_scale
            linear.weight.copy_(weight if self.layer.low_rank is None else weight + self.branch)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def compressed(self) -> CompressedLinear:
        """The layer with the weights that training found, on the grid it was given."""
        bias = None if self.bias is None else self.bias.detach().numpy().copy()
        seen = self.seen().detach().numpy()
        given = self.layer.weight
        if not self.layer.quantized:
            return CompressedLinear(seen.astype(given.dtype), bias)
        values = given.grid.nearest(seen / self.steps.numpy())
        weight = QuantizedWeight(values, given.scales, given.format, given.group_size, given.tensor_scale)
        return CompressedLinear(weight, bias, self.layer.activation, self.layer.low_rank, self.layer.input_scale)


def constrain(
    policy: nn.Module,
    layers: Mapping[str, CompressedLinear],
    pruned: Collection[str],
    others: Mapping[str, Callable[..., ConstrainedLinear]] | None = None,
) -> None:
    """Put constrained layers in the place of the policy's own.

    Args:
        layers: "stage.path" -> what became of it, for every layer. pruned: names of those whose zeros stay.
        others: "stage.path" -> what makes its constrained layer, for those that other libraries train.
    """
    others = others or {}
    places = _places(policy)
    for name, layer in layers.items():
        module = policy.get_submodule(name)
        _exchange(places.pop(module), others.get(name, ConstrainedLinear)(module, layer, name in pruned))


def release(policy: nn.Module) -> dict[str, CompressedLinear]:
    """Take them out again, the policy keeping the weights they saw; name -> layer as it is now."""
    layers, places = {}, _places(policy)
    for name, module in list(policy.named_modules()):
        if isinstance(module, ConstrainedLinear):
            layers[name] = module.compressed()
            _exchange(places.pop(module), module.plain())
    return layers


def _places(policy: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Every module -> (parent, its name there): more than one where stages share it."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in policy.modules():
        for own, module in parent.named_children():
            places.setdefault(module, []).append((parent, own))
    return places


def _exchange(places: Sequence[tuple[nn.Module, str]], module: nn.Module) -> None:
    for parent, own in places:
        setattr(parent, own, module)
