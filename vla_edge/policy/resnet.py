"""ResNet-18 and -34 (He et al., 2016, arXiv:1512.03385) up to their last feature map, as torchvision lays them out.

Batch normalization of a trained network is a scale and a shift of what the convolution before it gives, and is part of
that convolution here; group normalization, which takes its place in diffusion policies, stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.convolution import Convolution, GroupNorm, convolution_weight

STAGES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
BATCH_NORM_EPS = 1e-5
GROUP = 16  # channels
REDUCTION = 32  # of height and width


class Part(nn.Module):
    """A convolution and its normalization."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, grouped: bool):
        super().__init__()
        self.convolution = Convolution(inputs, outputs, (kernel, kernel), stride, kernel // 2, bias=not grouped)
        self.norm = GroupNorm(outputs // GROUP, outputs) if grouped else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x))


class BasicBlock(nn.Module):
    """Two convolutions beside what came in, brought to their size where it is another."""

    def __init__(self, inputs: int, outputs: int, stride: int, grouped: bool):
        super().__init__()
        self.first = Part(inputs, outputs, 3, stride, grouped)
        self.second = Part(outputs, outputs, 3, 1, grouped)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Part(inputs, outputs, 1, stride, grouped)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """(B, 3, H, W) -> (B, H / 32, W / 32, channels), rounded up.

    Args:
        blocks: of each of the four stages.
        width: channels of the first; those of the others are twice, four and eight times as many.
        grouped: group normalization, in groups of 16 channels, instead of batch normalization.
    """

    def __init__(self, blocks: tuple[int, ...], width: int, grouped: bool):
        super().__init__()
        self.stem = Part(3, width, 7, 2, grouped)
        self.blocks = nn.ModuleList()
        inputs = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                outputs = width * 2**stage
                self.blocks.append(BasicBlock(inputs, outputs, 2 if stage and not index else 1, grouped))
                inputs = outputs
        self.width = inputs

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image.permute(0, 2, 3, 1)).relu()
        x = F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x


def feature_size(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of the last feature map of a picture."""
    return -(-height // REDUCTION), -(-width // REDUCTION)


def resnet_names(blocks: tuple[int, ...], stem: tuple[str, str], stages: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """(ours, convolution, normalization) of each part, the latter two as the file names them.

    Args:
        stem, stages: how the file names the first convolution and its normalization, and the four stages.
    """
    yield "stem", *stem
    number, kinds = 0, (("first", "conv1", "bn1"), ("second", "conv2", "bn2"), ("shortcut", "downsample.0", "downsample.1"))
    for stage, (name, count) in enumerate(zip(stages, blocks, strict=True)):
        for index in range(count):
            for ours, convolution, norm in kinds if stage and not index else kinds[:2]:
                place = f"{name}.{index}"
                yield f"blocks.{number}.{ours}", f"{place}.{convolution}", f"{place}.{norm}"
            number += 1


def part_names(convolution: str, norm: str, grouped: bool) -> list[str]:
    """The tensors that one part is made of."""
    kinds = ("weight", "bias") if grouped else ("weight", "bias", "running_mean", "running_var")
    return [f"{convolution}.weight", *(f"{norm}.{kind}" for kind in kinds)]


def part_tensors(weights: Mapping[str, Tensor], convolution: str, norm: str, grouped: bool) -> dict[str, Tensor]:
    """The state of a `Part`."""
    weight, *parts = (weights[name].float() for name in part_names(convolution, norm, grouped))
    if grouped:
        kept = {"norm.weight": parts[0], "norm.bias": parts[1]}
        return {"convolution.linear.weight": convolution_weight(weight), **kept}
    gain, bias, mean, variance = parts
    scale = gain / (variance + BATCH_NORM_EPS).sqrt()
    return {
        "convolution.linear.weight": convolution_weight(weight * scale[:, None, None, None]),
        "convolution.linear.bias": bias - mean * scale,
    }
