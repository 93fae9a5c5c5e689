"""Compressed layers on disk, where those of a policy larger than memory wait to be exported.

A file holds the layers of one piece and the parameters beside them, as safetensors; what a layer is besides its arrays is
JSON in the file's header. It is written under another name and renamed: a file that is there is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vla_edge.compress.quantize.packing import pack_4_bits, unpack_signed
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, LowRank, QuantizedWeight
from vla_edge.files import write_whole

_LAYERS, _PARAMETERS = "layers", "parameters"
_CONTENT = "content"  # one entry in the header: of several the order would differ from one process to another


def write_layers(path: Path, layers: Mapping[str, CompressedLinear], parameters: Mapping[str, np.ndarray]) -> None:
    """Layers by name, and parameters of the modules beside them, to `path`."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}

    def put(name: str, array: np.ndarray, packed: bool = False) -> dict:
        array = np.ascontiguousarray(array)
        raw = pack_4_bits(array) if packed else array.reshape(-1).view(np.uint8)
        arrays[name] = raw
        return {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "packed": packed}

    told = {name: _parts(layer, name, put) for name, layer in layers.items()}
    kept = {name: put(f"{_PARAMETERS}/{name}", value) for name, value in parameters.items()}
    write_whole(path, save(arrays, {_CONTENT: json.dumps({_LAYERS: told, _PARAMETERS: kept})}))


class LayerFiles(Mapping):
    """Name -> `CompressedLinear` of all files of `write_layers`, each read when it is asked for and not kept.

    Args:
        order: of the names.
    """

    def __init__(self, files: Iterable[Path], order: Iterable[str]):
        self._layers: dict[str, tuple[Path, dict]] = {}
        self._parameters: dict[str, tuple[Path, dict]] = {}
        for path in files:
            with _opened(path) as file:
                content = json.loads(file.metadata()[_CONTENT])
            self._layers |= {name: (path, parts) for name, parts in content[_LAYERS].items()}
            self._parameters |= {name: (path, part) for name, part in content[_PARAMETERS].items()}
        self._layers = {name: self._layers[name] for name in order}

    def __getitem__(self, name: str) -> CompressedLinear:
        path, parts = self._layers[name]
        with _opened(path) as file:
            return _layer(parts, lambda part: _array(file, part))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def parameters(self, names: Mapping[str, object]) -> dict[str, np.ndarray]:
        """Those of `names` that were written beside layers."""
        found = {}
        for name in names:
            if name in self._parameters:
                path, part = self._parameters[name]
                with _opened(path) as file:
                    found[name] = _array(file, part)
        return found


def _parts(layer: CompressedLinear, name: str, put) -> dict:
    """The layer in plain types, its arrays given to `put`."""
    told: dict = {"activation": None if layer.activation is None else asdict(layer.activation)}
    for kind in ("bias", "input_scale"):
        value = getattr(layer, kind)
        told[kind] = None if value is None else put(f"{name}/{kind}", value)
    weight = layer.weight
    if layer.quantized:
        told["grid"] = {"format": weight.format, "group_size": weight.group_size, "tensor_scale": weight.tensor_scale}
        told["values"] = put(f"{name}/values", weight.values, weight.format == "int4")
        told["scales"] = put(f"{name}/scales", weight.scales)
    elif weight is not None:
        told["weight"] = put(f"{name}/weight", weight)
    if layer.low_rank is not None:
        told["low_rank"] = [put(f"{name}/{kind}", getattr(layer.low_rank, kind)) for kind in ("down", "up")]
    return told


def _layer(told: dict, array) -> CompressedLinear:
    """Inverse of `_parts`."""

    def optional(part):
        return None if part is None else array(part)

    weight = optional(told.get("weight"))
    if "grid" in told:
        weight = QuantizedWeight(array(told["values"]), array(told["scales"]), **told["grid"])
    low_rank = told.get("low_rank")
    return CompressedLinear(
        weight,
        optional(told["bias"]),
        None if told["activation"] is None else ActivationQuant(**told["activation"]),
        None if low_rank is None else LowRank(*map(array, low_rank)),
        optional(told["input_scale"]),
    )


def _array(file, part: dict) -> np.ndarray:
    raw = file.get_tensor(part["name"])
    if part["packed"]:
        return unpack_signed(raw, int(np.prod(part["shape"]))).reshape(part["shape"])
    return raw.view(_dtype(part["dtype"])).reshape(part["shape"])


def _dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # numpy itself has no such type

        return np.dtype(getattr(ml_dtypes, name))


def _opened(path: Path):
    from safetensors import safe_open

    return safe_open(path, framework="numpy")
