"""Base checkpoint + adapter -> a checkpoint of its own, which needs neither.

The base's weights are copied and the tensors that change are written over, one after the other, in their type: memory
holds one layer at a time, and every other tensor stays byte for byte what it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vla_edge.files import whole_directory
from vla_edge.policy.adapter import Adapter, AdapterError, Change, load_adapter
from vla_edge.policy.checkpoint import ROBOT_FILE, WEIGHTS_FILE, Checkpoint, load_checkpoint
from vla_edge.policy.checkpoint_files import CheckpointError, read_json
from vla_edge.policy.checkpoint_processors import POSTPROCESSOR, PREPROCESSOR
from vla_edge.policy.nf4 import nf4_rounded
from vla_edge.policy.weights import open_tensors


@dataclass(frozen=True)
class Merged:
    """What was done.

    Attributes:
        directory: the new checkpoint.
        factored: weights that had a low-rank product added. replaced: tensors trained as a whole.
        adopted: files of the adapter's directory that took the place of the base's.
    """

    directory: Path
    factored: int
    replaced: int
    adopted: tuple[str, ...]


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    nf4_base: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> Merged:
    """Write the checkpoint that `base` becomes with `adapter`.

    What LeRobot saves beside an adapter (config.json, the processors and their statistics, our vla_edge.json) is what
    the adapter was trained under, and is taken where it is there.

    Args:
        base: checkpoint directory. adapter: directory that peft has written. output: a directory that is not there yet.
        nf4_base: round the weights of linear layers that get a product to NF4 first: the very network that QLoRA
            trained, where it rounded those layers, instead of its adapter on the better weights.

    Raises:
        CheckpointError, AdapterError: what is wrong, before anything is written or with nothing left.
    """
    tell = progress or (lambda fraction, step: None)
    output = Path(output).expanduser().resolve()
    checkpoint = load_checkpoint(base)
    if output.exists():
        raise CheckpointError(f"{output} exists and is not replaced; choose another output")
    if output.is_relative_to(checkpoint.directory):
        raise CheckpointError(f"{output} lies in the base checkpoint; choose another output")
    found = load_adapter(adapter)
    if len(checkpoint.weights) > 1:
        raise CheckpointError(
            f"{checkpoint.directory} keeps its weights in {len(checkpoint.weights)} shards; merge with peft where they "
            f"were trained, or save the base as one {WEIGHTS_FILE}"
        )
    (weights,) = checkpoint.weights
    _check_fits(found, weights)
    with whole_directory(output, CheckpointError) as temporary:
        tell(0.0, "copying the base")
        adopted = _copy(checkpoint, found.directory, temporary)
        _write_over(weights, found, temporary / WEIGHTS_FILE, nf4_base, tell)
        try:
            load_checkpoint(temporary)
        except CheckpointError as error:
            raise AdapterError(
                f"{found.directory} does not go with {checkpoint.directory}: "
                f"{str(error).replace(str(temporary), str(output))}"
            ) from error
    changes = found.changes.values()
    factored, replaced = (sum(getattr(c, kind) is not None for c in changes) for kind in ("factors", "whole"))
    return Merged(output, factored, replaced, adopted)


def _check_fits(adapter: Adapter, weights: Path) -> None:
    """Raises AdapterError where a tensor has no counterpart in the base or one of another shape."""
    with open_tensors(weights) as base:
        there = set(base.keys())
        for name, change in adapter.changes.items():
            if name not in there:
                near = next((known for known in sorted(there) if known.split(".")[-2:] == name.split(".")[-2:]), None)
                raise AdapterError(
                    f"{adapter.weights_path} changes {name}, which {weights} has not"
                    f"{f' (it has {near})' if near else ''}; give the base the adapter was trained on"
                )
            entry = base.get_slice(name)
            shape = tuple(entry.get_shape())
            if entry.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise AdapterError(
                    f"{weights} stores {name} as {entry.get_dtype()}; merge onto the base in floating point"
                )
            for used, size in _expected(change, adapter, shape).items():
                if adapter.shapes[used] != size:
                    raise AdapterError(
                        f"{used} of {adapter.weights_path} is of shape {adapter.shapes[used]}, but {name} of shape "
                        f"{shape} in {weights} asks for {size}; give the base the adapter was trained on"
                    )


def _expected(change: Change, adapter: Adapter, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Tensor of the adapter -> the shape it must have to change one of `shape`."""
    found = {name: shape for name in change.names()}
    if change.factors is not None:
        factors = change.factors
        rows, *inputs = reversed(shape) if factors.transposed else shape
        rank, kernel = adapter.shapes[factors.a][0], len(inputs) - 1
        found |= {factors.a: (rank, *inputs), factors.b: (rows, rank, *[1] * kernel)}
        if factors.magnitude:
            found[factors.magnitude] = (1, rows, *[1] * kernel) if kernel else (rows,)
    return found


def _copy(checkpoint: Checkpoint, adapter: Path, directory: Path) -> tuple[str, ...]:
    """The base with what the adapter was trained under; returns the names of the files taken from the adapter."""
    pipelines = [f"{name}.json" for name in (PREPROCESSOR, POSTPROCESSOR)]
    shutil.copytree(checkpoint.directory, directory, dirs_exist_ok=True)
    adopted = [name for name in (ROBOT_FILE, *pipelines) if (adapter / name).is_file()]
    for pipeline in set(adopted) & set(pipelines):
        adopted += [path.name for path in sorted(adapter.glob(f"{Path(pipeline).stem}_step_*.safetensors"))]
    for name in adopted:
        shutil.copyfile(adapter / name, directory / name)
    if (adapter / "config.json").is_file():
        # the backbone lies in the base, and there is no adapter any more
        config = read_json(adapter / "config.json") | {
            "use_peft": False, "pretrained_path": None,
            **{key: checkpoint.config[key] for key in ("vlm_model_name",) if key in checkpoint.config},
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        adopted.append("config.json")
    return tuple(sorted(adopted))


def _write_over(weights: Path, adapter: Adapter, copy: Path, nf4_base: bool, tell) -> None:
    """Every changed tensor into `copy`, a copy of `weights`, where that tensor lies."""
    import torch

    copy.chmod(0o644)
    begins = _begins(copy)
    with open_tensors(weights) as base, open_tensors(adapter.weights_path) as tensors, open(copy, "r+b") as file:
        for index, (name, change) in enumerate(adapter.changes.items()):
            tell(index / len(adapter.changes), "merging")
            weight = merged(base.get_tensor(name), change, tensors.get_tensor, nf4_base)
            if not torch.isfinite(weight).all():
                raise AdapterError(
                    f"{name} of {weights} leaves the range of {weight.dtype} with {adapter.weights_path}; "
                    "check that it is the base the adapter was trained on"
                )
            file.seek(begins[name])
            file.write(weight.contiguous().flatten().view(torch.uint8).numpy())


def merged(weight, change: Change, read: Callable, nf4_base: bool = False):
    """One tensor with its change, computed in float32 or better and rounded once to the tensor's type.

    Args:
        read: name -> tensor of the adapter.
        nf4_base: see `merge_adapter`.
    """
    import torch

    kind = torch.promote_types(weight.dtype, torch.float32)
    value = (read(change.whole) if change.whole else weight).to(kind)
    if change.added is not None:
        name, scale = change.added
        value = value + scale * read(name).to(kind)
    if change.factors is not None:
        factors = change.factors
        if nf4_base and value.ndim == 2 and not factors.transposed:
            value = nf4_rounded(value)
        rows = value.T if factors.transposed else value
        a, b = (read(name).to(kind).flatten(1) for name in (factors.a, factors.b))
        rows = rows + factors.scale * (b @ a).reshape(rows.shape)
        if factors.magnitude:
            lengths = torch.linalg.vector_norm(rows.flatten(1), dim=1)
            gain = read(factors.magnitude).to(kind).flatten() / lengths
            rows = rows * gain.reshape(-1, *[1] * (rows.ndim - 1))
        value = rows.T if factors.transposed else rows
    return value.to(weight.dtype)


def _begins(path: Path) -> dict[str, int]:
    """Tensor of a safetensors file -> its first byte: eight bytes of length, a header in JSON, then the data."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
