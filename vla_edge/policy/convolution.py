"""Convolutions as the linear layers over patches that they are, channels last.

So their weights are found, calibrated, rounded and written like all others, by name and in every format: a runtime sees
slices, a concatenation and a product. What is gained over a convolution of its own is that everything applies; what it
costs is that a patch is copied before it is multiplied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """(B, *size, C) -> (B, *smaller, taps * C): what each place of a convolution sees, taps in order, channels inside.

    Args:
        kernel, stride, padding: of one or two dimensions, as `size` has.
    """
    if any(padding):
        x = F.pad(x, (0, 0) + tuple(around for around in reversed(padding) for _ in range(2)))
    # a dimension at a time: fewer slices than one for each tap
    for axis, (taps, step) in enumerate(zip(kernel, stride, strict=True), 1):
        places = (x.shape[axis] - taps) // step + 1
        seen = [x.narrow(axis, tap, (places - 1) * step + 1) for tap in range(taps)]
        if step > 1:
            seen = [_every(part, axis, step) for part in seen]
        x = torch.cat(seen, dim=-1)
    return x


def _every(x: Tensor, axis: int, stride: int) -> Tensor:
    index = [slice(None)] * x.ndim
    index[axis] = slice(None, None, stride)
    return x[tuple(index)]


class Convolution(nn.Module):
    """(B, *size, inputs) -> (B, *smaller, outputs), zeros around.

    Args:
        kernel: taps along each dimension. stride, padding: likewise, or one number for all.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        bias: bool = True,
    ):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, _each(stride, kernel), _each(padding, kernel)
        self.linear = nn.Linear(math.prod(kernel) * inputs, outputs, bias)

    @property
    def inputs(self) -> int:
        """Channels."""
        return self.linear.in_features // math.prod(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(patches(x, self.kernel, self.stride, self.padding))


class DepthwiseConvolution(nn.Module):
    """(B, *size, channels) -> (B, *smaller, channels), each channel by taps of its own; zeros around, no bias.

    A few numbers for each channel, and no product of matrices: nothing that the compressor is for, so that they stay
    floats, as those of norms do.
    """

    def __init__(
        self, channels: int, kernel: tuple[int, ...], stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] = 0
    ):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, _each(stride, kernel), _each(padding, kernel)
        self.weight = nn.Parameter(torch.zeros(channels, 1, *kernel))

    def forward(self, x: Tensor) -> Tensor:
        convolve = F.conv1d if len(self.kernel) == 1 else F.conv2d
        x = convolve(x.movedim(-1, 1), self.weight, None, self.stride, self.padding, groups=len(self.weight))
        return x.movedim(1, -1)


class FactoredConvolution(nn.Module):
    """Thinner convolutions, one after the other, in the place of one.

    Args:
        parts: `Convolution`s and `DepthwiseConvolution`s.
    """

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.linear = nn.Sequential(*parts)  # named as what it stands for: targets of recipes mean what they meant

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _each(number: int | tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (number,) * len(kernel) if isinstance(number, int) else tuple(number)


def convolution_weight(weight: Tensor) -> Tensor:
    """A convolution's weight (outputs, inputs, *kernel), as torch stores it -> that of `Convolution`'s layer."""
    # `patches` puts the taps of a later dimension outside those of an earlier one
    axes = (0, *range(weight.ndim - 1, 1, -1), 1)
    return weight.permute(axes).reshape(weight.shape[0], -1)


class Upsampling(nn.Module):
    """A transposed convolution over time of 4 taps, stride 2 and padding 1: (B, T, C) -> (B, 2 T, C).

    Each place gives four values, which fall on the output one place before it to two after: one product, and sums.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 4 * width, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        before, even, odd, after = self.linear(x).chunk(4, dim=-1)
        even = even + F.pad(after, (0, 0, 1, 0))[:, :-1]
        odd = odd + F.pad(before, (0, 0, 0, 1))[:, 1:]
        return torch.stack([even, odd], dim=2).reshape(batch, 2 * length, width) + self.bias


def upsampling_weight(weight: Tensor) -> Tensor:
    """A transposed convolution's weight (inputs, outputs, 4), as torch stores it -> that of `Upsampling`'s layer."""
    return weight.permute(2, 1, 0).reshape(-1, weight.shape[0])


class GroupNorm(nn.Module):
    """Group normalization (Wu & He, 2018), channels last: (B, *size, C)."""

    def __init__(self, groups: int, width: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape[0], x.shape[-1]
        grouped = x.reshape(batch, -1, self.groups, width // self.groups)
        centred = grouped - grouped.mean((1, 3), keepdim=True)
        spread = torch.sqrt(centred.square().mean((1, 3), keepdim=True) + self.eps)
        return (centred / spread).reshape(x.shape) * self.weight + self.bias
