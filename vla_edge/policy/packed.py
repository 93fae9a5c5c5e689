"""Weights that another library has rounded already, as it stores them: integers, several in a word, with scales beside.

| layout | tensors of a layer | weight |
|---|---|---|
| compressed-tensors, packed | weight_packed, weight_scale, weight_shape, weight_zero_point | (q - z) scale |
| compressed-tensors, ModelOpt: INT8, FP8 | weight, weight_scale, pre_quant_scale | q scale |
| ModelOpt: INT4 ("W4A16_AWQ") | the same, two outputs in a byte | q scale |
| GPTQ | qweight, qzeros, scales, g_idx | (q - z - 1) scale, or (q - z) scale of its second version |
| AWQ | qweight, qzeros, scales | (q - z) scale |
| bitsandbytes NF4 | weight, absmax, quant_map, quant_state | quant_map[q] absmax |

All but NF4's are equal steps, so that integers and scales can be taken over as they are. NF4's are the numbers of a table:
they are loaded as what they stand for, and so is a weight whose inputs are scaled first (pre_quant_scale).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vla_edge.policy.checkpoint_files import CheckpointError

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ's kernels have each of eight outputs."""
_LAYOUTS = {
    "weight_packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
                      "input_zero_point"),
    "qweight": ("qweight", "qzeros", "scales", "g_idx"),
    "weight_scale": ("weight", "weight_scale", "weight_scale_2", "weight_zero_point", "pre_quant_scale", "input_scale",
                     "input_zero_point"),
    "weight.absmax": ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4",
                      "weight.nested_absmax", "weight.nested_quant_map"),
}  # fmt: skip


@dataclass(frozen=True)
class Unpacked:
    """A weight as float32 torch tensors.

    Attributes:
        weight: (out, in). steps: (out, groups) sizes of a step; None where there are no equal steps.
    """

    weight: object
    steps: object | None

    def steps_of_each(self):
        """(out, in): the step of each value, NaN where there is none."""
        if self.steps is None:
            return self.weight.new_full(self.weight.shape, float("nan"))
        return self.steps.repeat_interleave(self.weight.shape[1] // self.steps.shape[1], 1)


@dataclass(frozen=True)
class Packed:
    """Where the parts of a layer's weight are.

    Attributes:
        kind: key of `_LAYOUTS`. parts: name of the part -> name of the tensor.
    """

    kind: str
    parts: Mapping[str, str]

    def unpack(self, read: Callable[[str], object], where: Path) -> Unpacked:
        """Args: read: a tensor by name. where: the checkpoint's file, for errors and its neighbours.

        Raises:
            CheckpointError: it is stored in a way that is not known.
        """
        tensors = {part: read(name) for part, name in self.parts.items()}
        try:
            return _UNPACK[self.kind](tensors, where)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{where} holds {next(iter(self.parts.values()))!r}, whose rounding is not understood ({error}); give the "
                "weights it was quantized from"
            ) from error


def find_packed(names: Iterable[str]) -> dict[str, Packed]:
    """Weight -> its parts, of all that are stored rounded."""
    names, found = set(names), {}
    for mark, parts in _LAYOUTS.items():
        for name in names:
            if name.endswith(f".{mark}") and f"{name[: -len(mark)]}weight" not in found:
                layer = name[: -len(mark)]
                there = {part: f"{layer}{part}" for part in parts if f"{layer}{part}" in names}
                found[f"{layer}weight"] = Packed(mark, there)
    return found


def _compressed(tensors: Mapping, where: Path) -> Unpacked:
    """compressed-tensors' "pack-quantized": words along the inputs, integers raised by half their range."""
    packed, rows = tensors["weight_packed"], tensors["weight_shape"].tolist()
    _plain_order(tensors.get("weight_g_idx"), tensors["weight_scale"].shape[1])
    bits = _bits(rows[1], packed.shape[1])
    half = 1 << (bits - 1)
    values = _words(packed, bits)[:, : rows[1]] - half
    if "weight_zero_point" in tensors:
        zeros = _words(tensors["weight_zero_point"].T, bits).T[: rows[0]] - half
        values = values - zeros.repeat_interleave(rows[1] // zeros.shape[1], 1)
    return _scaled(values, tensors["weight_scale"])


def _whole(tensors: Mapping, where: Path) -> Unpacked:
    """A value in each element, INT8 or FP8, or INT4 of two rows; scales of the tensor, of rows, or of groups."""
    import torch

    values, scale = tensors["weight"], tensors["weight_scale"]
    if "weight_scale_2" in tensors:
        raise ValueError("scales of scales, as NVFP4 has")
    if values.dtype == torch.uint8:
        nibbles = torch.stack([values & 15, values >> 4], 1).flatten(0, 1).to(torch.int8)
        values = torch.where(nibbles > 7, nibbles - 16, nibbles)
    if values.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"values of type {values.dtype}")
    if "weight_zero_point" in tensors and tensors["weight_zero_point"].any():
        raise ValueError("zero points of whole values")
    rows = values.shape[0]
    scale = scale.reshape(1, 1).expand(rows, 1) if scale.numel() == 1 else scale.reshape(rows, -1)
    found = _scaled(values.float(), scale)
    scaled = tensors.get("pre_quant_scale")
    if scaled is None or (scaled == 1).all():
        return found
    return Unpacked(found.weight * scaled.float(), None)


def _gptq_or_awq(tensors: Mapping, where: Path) -> Unpacked:
    words, scales = tensors["qweight"], tensors["scales"]
    return (_gptq if words.shape[1] == scales.shape[1] else _awq)(tensors, where)


def _gptq(tensors: Mapping, where: Path) -> Unpacked:
    """Words along the inputs, (in / 8, out); zero points along the outputs, one less than they are."""
    words, scales = tensors["qweight"], tensors["scales"]
    inputs = len(tensors["g_idx"]) if "g_idx" in tensors else 8 * words.shape[0]
    _plain_order(tensors.get("g_idx"), len(scales))
    bits = _bits(inputs, words.shape[0])
    zeros = _words(tensors["qzeros"], bits)[:, : scales.shape[1]] + (0 if _second_version(where) else 1)
    values = _words(words.T, bits)[:, :inputs]
    return _scaled(values - zeros.T.repeat_interleave(inputs // len(scales), 1), scales.T)


def _awq(tensors: Mapping, where: Path) -> Unpacked:
    """Words along the outputs, (in, out / 8), in an order of their own."""
    scales = tensors["scales"]
    values, zeros = (
        _words(tensors[part], 4).unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1) for part in ("qweight", "qzeros")
    )
    return _scaled((values - zeros.repeat_interleave(len(values) // len(scales), 0)).T, scales.T)


def _nf4(tensors: Mapping, where: Path) -> Unpacked:
    """Two codes in a byte, the first in the high half; blocks of the flattened weight."""
    import torch

    said = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist()))
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" in tensors:
        whole = tensors["weight.nested_absmax"].repeat_interleave(said["nested_blocksize"])[: len(absmax)]
        absmax = tensors["weight.nested_quant_map"][absmax.long()] * whole + said["nested_offset"]
    codes = tensors["weight"].flatten().long()
    codes = torch.stack([codes >> 4, codes & 15], 1).flatten()
    size = said["shape"][0] * said["shape"][1]
    values = tensors["weight.quant_map"].float()[codes[:size]]
    scales = absmax.float().repeat_interleave(said["blocksize"])[:size]
    return Unpacked((values * scales).reshape(said["shape"]), None)


_UNPACK = {"weight_packed": _compressed, "qweight": _gptq_or_awq, "weight_scale": _whole, "weight.absmax": _nf4}


def _scaled(values, scales) -> Unpacked:
    """(out, in) integers or FP8's numbers, and (out, groups) scales."""
    steps = scales.float().contiguous()
    if values.shape[1] % steps.shape[1]:
        raise ValueError(f"{steps.shape[1]} groups of {values.shape[1]} inputs")
    return Unpacked(values.float() * steps.repeat_interleave(values.shape[1] // steps.shape[1], 1), steps)


def _bits(values: int, words: int) -> int:
    """Of each of so many values in so many words of 32 bits."""
    found = [bits for bits in (4, 8) if -(-values * bits // 32) == words]
    if len(found) != 1:
        raise ValueError(f"{values} values in {words} words")
    return found[0]


def _words(words, bits: int):
    """(rows, words) int32 -> (rows, values) int64, the lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits)
    return ((words.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _plain_order(index, groups: int) -> None:
    """Raises ValueError: inputs of a group do not lie beside each other."""
    if index is None or (index < 0).all():
        return
    size = len(index) // groups
    if (index != (index.new_ones(len(index)).cumsum(0) - 1) // size).any():
        raise ValueError("inputs were put in another order, desc_act or actorder")


def _second_version(where: Path) -> bool:
    """Whether a GPTQ's zero points are stored as they are."""
    directory = where if where.is_dir() else where.parent
    for name in ("config.json", "quantize_config.json"):
        if (directory / name).is_file() and re.search(r'"gptq_v2"', (directory / name).read_text(encoding="utf-8")):
            return True
    return False
