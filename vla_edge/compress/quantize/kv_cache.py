"""Keys and values in 8 or 4 bits, from where they are made, once for each observation, to where every flow step or token
reads them.

Keys have outliers in fixed channels, so each channel gets a grid over the tokens; values have them in tokens, so each
token gets one over its channels (KVQuant, Hooper et al., 2024, arXiv:2401.18079). Tokens that are looked at most may
keep 8 bits where the others get 4 (ZipCache, He et al., 2024, arXiv:2405.14256). Grids are found for each observation:
x = low + step * code, with low and step in float16. What a policy that writes tokens adds to its prompt, one token after the
other, stays as it is, as the newest tokens do in KIVI (Liu et al., 2024, arXiv:2402.02750): it is little, and no grid of
the prompt's channels was made for it.

In the file these are `QuantizeLinear` and `DequantizeLinear` with a scale for each slice (opset 21). 4-bit codes cross
two in a byte: numpy has no arrays of 4 bits, in which runtimes could hand them on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vla_edge.compress.steps import KVCache
from vla_edge.policy.stages import TensorSpec

SALIENT_BITS = 8
CHANNELS, TOKENS = -1, -2
_SMALLEST_STEP = 2.0**-14  # the smallest normal number of float16


class Grid(nn.Module):
    """Rounds (..., P, hd) to unsigned codes, with one grid for each slice along an axis, and reads them again.

    Args:
        bits: 8 or 4. axis: that values of one grid lie along: TOKENS for a grid of each channel, CHANNELS for one of
            each token.
    """

    def __init__(self, bits: int, axis: int):
        super().__init__()
        self.bits, self.axis = bits, axis

    def store(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x -> codes (..., P, hd) uint8, of 4 bits (..., P, hd / 2); step and low in float16, one for each slice."""
        # of what is stored, so that it is the same number on both sides
        low = x.amin(self.axis, keepdim=True).half()
        step = (x.amax(self.axis, keepdim=True) - low.float()) / (2**self.bits - 1)
        step = step.clamp_min(_SMALLEST_STEP).half()
        codes = self._quantize(x - low.float(), step.float())
        return (codes if self.bits == 8 else _pack(codes)), step, low

    def load(self, codes: Tensor, step: Tensor, low: Tensor) -> Tensor:
        """Inverse of `store`, in float32."""
        codes = codes if self.bits == 8 else _unpack(codes)
        return self._dequantize(codes, step.float()) + low.float()

    def tensors(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """What `store` makes of `spec`."""
        *leading, length, width = spec.shape
        slices = (*leading, 1, width) if self.axis == TOKENS else (*leading, length, 1)
        codes = (*leading, length, width * self.bits // 8)
        return (
            TensorSpec(spec.name, codes, "uint8"),
            TensorSpec(f"{spec.name}_step", slices, "float16"),
            TensorSpec(f"{spec.name}_low", slices, "float16"),
        )

    def _quantize(self, x: Tensor, step: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            zero = torch.zeros(step.shape, dtype=torch.uint8)
            return _operator("QuantizeLinear", (x, step, zero), x.shape, torch.uint8, **self._block(x))
        return (x / step).round().clamp(0, 255).to(torch.uint8)

    def _dequantize(self, codes: Tensor, step: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return _operator("DequantizeLinear", (codes, step), codes.shape, torch.float32, **self._block(codes))
        return codes.float() * step

    def _block(self, x: Tensor) -> dict[str, int]:
        return {"axis": x.ndim + self.axis, "block_size": x.shape[self.axis]}


class CacheStore(nn.Module):
    """A cache -> the tensors that cross to the stages which read it.

    Args:
        step: what the recipe says. length: P, tokens of the cache.
    """

    def __init__(self, step: KVCache, length: int):
        super().__init__()
        self.parts = _parts(step, length)

    @property
    def ranks(self) -> bool:
        """Whether it matters how much a token is looked at."""
        return len(self.parts) > 1

    def forward(self, keys: Tensor, values: Tensor, mask: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Of keys and values (layers, B, KVH, P, hd), mask (B, P) and what goes along as it is; the last argument, (B, P),
        says how much each token is looked at."""
        *along, looks = others
        if self.ranks:
            # the order of tokens means nothing to those who look at them: positions are in the keys
            order = looks.topk(looks.shape[1]).indices
            mask = mask.gather(1, order)
            order = order[None, :, None, :, None].expand_as(keys)
            keys, values = keys.gather(3, order), values.gather(3, order)
        crossing = []
        for part in self.parts:
            crossing += part.keys.store(keys.narrow(3, part.begin, part.count))
            crossing += part.values.store(values.narrow(3, part.begin, part.count))
        return (*crossing, mask, *along)

    def tensors(self, cache: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """What crosses in the place of keys, values and the rest of a cache."""
        keys, values, *rest = cache
        found = []
        for part in self.parts:
            for spec, grid in ((keys, part.keys), (values, part.values)):
                *leading, _, width = spec.shape
                found += grid.tensors(TensorSpec(f"{spec.name}{part.name}", (*leading, part.count, width)))
        return (*found, *rest)


class CacheLoad(nn.Module):
    """What `CacheStore` made -> keys and values of each layer, (B, KVH, P, hd), and the rest of the cache. Arguments as of
    `CacheStore`.

    Layer by layer: a whole cache in float32 beside its codes would be larger than the one that was to be saved.
    """

    def __init__(self, step: KVCache, length: int):
        super().__init__()
        self.parts = _parts(step, length)

    def forward(self, *crossing: Tensor) -> tuple[list[Tensor], list[Tensor], *tuple[Tensor, ...]]:
        keys, values = [], []
        for layer in range(len(crossing[0])):
            pairs = [
                part.load([tensor[layer] for tensor in crossing[6 * index : 6 * index + 6]])
                for index, part in enumerate(self.parts)
            ]
            for found, parts in zip((keys, values), zip(*pairs)):
                found.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
        return (keys, values, *crossing[6 * len(self.parts) :])


class _Part(nn.Module):
    """`count` tokens from `begin` on, in the order of how much they are looked at."""

    def __init__(self, name: str, begin: int, count: int, bits: int, values: str):
        super().__init__()
        self.name, self.begin, self.count = name, begin, count
        self.keys = Grid(bits, TOKENS)
        self.values = Grid(bits, TOKENS if values == "channel" else CHANNELS)

    def load(self, crossing: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The six tensors of one layer -> its keys and values."""
        return self.keys.load(*crossing[:3]), self.values.load(*crossing[3:])


def _parts(step: KVCache, length: int) -> nn.ModuleList:
    salient = step.salient_tokens(length)
    counts = [("_salient", 0, salient, SALIENT_BITS), ("", salient, length - salient, step.bits)]
    return nn.ModuleList(_Part(*entry, step.values) for entry in counts if entry[2])


def _pack(codes: Tensor) -> Tensor:
    """(..., hd) 4-bit codes -> (..., hd / 2) bytes: the first half of the channels in the low bits."""
    low, high = codes.chunk(2, -1)
    if torch.onnx.is_in_onnx_export():
        high = _operator("BitShift", (high, _byte(4)), high.shape, torch.uint8, direction="LEFT")
        return _operator("BitwiseOr", (low, high), low.shape, torch.uint8)
    return low | (high << 4)


def _unpack(packed: Tensor) -> Tensor:
    """Inverse of `_pack`."""
    if torch.onnx.is_in_onnx_export():
        low = _operator("BitwiseAnd", (packed, _byte(15)), packed.shape, torch.uint8)
        high = _operator("BitShift", (packed, _byte(4)), packed.shape, torch.uint8, direction="RIGHT")
    else:
        low, high = packed & 15, packed >> 4
    return torch.cat([low, high], -1)


def _byte(value: int) -> Tensor:
    return torch.full((), value, dtype=torch.uint8)


def _operator(name: str, inputs: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, **attributes) -> Tensor:
    """An operator of ONNX's standard that PyTorch has no counterpart of."""
    from vla_edge.engine.trace import OPSET

    return torch.onnx.ops.symbolic(name, inputs, attrs=attributes, dtype=dtype, shape=tuple(shape), version=OPSET)
