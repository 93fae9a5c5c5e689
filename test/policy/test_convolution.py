"""Convolutions as products over patches are torch's convolutions, in every shape that policies use."""

from __future__ import annotations

import pytest
import torch

from vla_edge.policy.convolution import (
    Convolution,
    DepthwiseConvolution,
    FactoredConvolution,
    GroupNorm,
    Upsampling,
    convolution_weight,
    upsampling_weight,
)


@pytest.mark.parametrize("kernel, stride, padding", [(7, 2, 3), (3, 1, 1), (3, 2, 1), (1, 2, 0), (1, 1, 0)])
@pytest.mark.parametrize("size", [(17, 23), (16,)], ids=["pictures", "time"])
def test_a_product_over_patches_is_the_convolution(size, kernel, stride, padding):
    torch.manual_seed(0)
    theirs = (torch.nn.Conv1d if len(size) == 1 else torch.nn.Conv2d)(5, 6, kernel, stride, padding)
    ours = Convolution(5, 6, (kernel,) * len(size), stride, padding)
    ours.linear.load_state_dict({"weight": convolution_weight(theirs.weight), "bias": theirs.bias})
    x = torch.randn(2, 5, *size)
    torch.testing.assert_close(ours(x.movedim(1, -1)).movedim(-1, 1), theirs(x), atol=3e-6, rtol=0)


@pytest.mark.parametrize("kernel, stride, padding", [((3, 1), (2, 1), (1, 0)), ((1, 5), (1, 3), (0, 2)), ((3, 2), (1, 2), (0, 1))])
def test_dimensions_may_differ_and_channels_may_stay_apart(kernel, stride, padding):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 17, 23)
    theirs = torch.nn.Conv2d(6, 4, kernel, stride, padding)
    ours = Convolution(6, 4, kernel, stride, padding)
    ours.linear.load_state_dict({"weight": convolution_weight(theirs.weight), "bias": theirs.bias})
    assert ours.inputs == 6
    torch.testing.assert_close(ours(x.movedim(1, -1)).movedim(-1, 1), theirs(x), atol=3e-6, rtol=0)
    theirs = torch.nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=False)
    ours = DepthwiseConvolution(6, kernel, stride, padding)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x.movedim(1, -1)).movedim(-1, 1), theirs(x), atol=3e-6, rtol=0)


def test_factors_are_one_after_the_other_and_named_as_the_layer_they_stand_for():
    parts = Convolution(5, 3, (1,)), DepthwiseConvolution(3, (3,), padding=1), Convolution(3, 4, (1,))
    torch.nn.init.normal_(parts[1].weight)
    whole, x = FactoredConvolution(*parts), torch.randn(1, 8, 5)
    torch.testing.assert_close(whole(x), parts[2](parts[1](parts[0](x))))
    layers = [name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)]
    assert layers == ["linear.0.linear", "linear.2.linear"]


def test_upsampling_is_the_transposed_convolution():
    theirs, ours = torch.nn.ConvTranspose1d(6, 6, 4, 2, 1), Upsampling(6)
    ours.load_state_dict({"linear.weight": upsampling_weight(theirs.weight), "bias": theirs.bias})
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(ours(x.mT).mT, theirs(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(7, 9), (8,)], ids=["pictures", "time"])
def test_group_normalization_is_torchs(size):
    theirs, ours = torch.nn.GroupNorm(2, 6), GroupNorm(2, 6)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = 3 * torch.randn(2, 6, *size) + 1
    torch.testing.assert_close(ours(x.movedim(1, -1)).movedim(-1, 1), theirs(x), atol=1e-5, rtol=0)
