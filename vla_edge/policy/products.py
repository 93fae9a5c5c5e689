"""Products in bfloat16, for inferences that need not be exact, such as those a policy is calibrated on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

from torch import Tensor, nn
from torch.nn import functional as F

LEAST_GAIN = 2.0
_ROWS, _WIDTH, _TURNS = 256, 2048, 5


@contextmanager
def in_bfloat16(module: nn.Module) -> Iterator[None]:
    """A context in which linear layers round what they multiply to bfloat16; sums, and everything else, stay in float32.

    Layers whose weights are on PyTorch's "meta" device are left alone.
    """
    import torch

    layers = [part for part in module.modules() if type(part) is nn.Linear and not part.weight.is_meta]
    for layer in layers:
        layer.forward = partial(_product, layer.weight.to(torch.bfloat16), layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    y = F.linear(x.to(weight.dtype), weight).float()
    return y if bias is None else y + bias


@lru_cache(maxsize=1)
def bfloat16_gain() -> float:
    """How many times as fast this processor multiplies bfloat16 as float32, with the threads PyTorch has now."""
    import torch

    x, weight = torch.ones(_ROWS, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    with torch.inference_mode():
        exact, rounded = (
            min(_seconds(partial(F.linear, x.to(kind), weight.to(kind))) for _ in range(_TURNS))
            for kind in (torch.float32, torch.bfloat16)
        )
    return exact / rounded


def bfloat16_pays() -> bool:
    """Whether rounding products to bfloat16 is so much faster here that converting weights for it is worth its time."""
    return bfloat16_gain() > LEAST_GAIN


def _seconds(call: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
