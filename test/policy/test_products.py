"""Products in bfloat16 are those and no others, where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vla_edge.policy import products
from vla_edge.policy.products import bfloat16_gain, bfloat16_pays, in_bfloat16


def test_only_what_linear_layers_multiply_is_rounded():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64, bias=False)), torch.randn(3, 64)
    first, norm, second = module
    seen = []
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    before = module(x)
    with in_bfloat16(module):
        found = module(x)
    rounded = torch.bfloat16
    h = norm((x.to(rounded) @ first.weight.to(rounded).T).float() + first.bias)
    expected = (h.to(rounded) @ second.weight.to(rounded).T).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    assert 0 < (found - before).abs().max() < 0.1
    assert all(torch.equal(given, x) for given in seen) and len(seen) == 2  # hooks see what reaches the layer
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)


def test_weights_that_are_not_in_memory_are_left_alone():
    module = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4))
    with in_bfloat16(module):
        assert "forward" not in vars(module[0]) and "forward" in vars(module[1])
    assert "forward" not in vars(module[1])


@pytest.mark.parametrize("gain, pays", [(4.0, True), (1.5, False), (0.2, False)])
def test_it_pays_where_it_is_much_faster(monkeypatch, gain, pays):
    seconds = iter([gain] * products._TURNS + [1.0] * products._TURNS)
    monkeypatch.setattr(products, "_seconds", lambda call: next(seconds))
    bfloat16_gain.cache_clear()
    try:
        assert bfloat16_pays() is pays
        assert bfloat16_gain() == gain
    finally:
        bfloat16_gain.cache_clear()
