"""The tensors of a checkpoint: one safetensors file or the shards an index lists, mapped into memory.

A tensor is read when it is asked for and nothing is kept, so that a policy is loaded at the size of the policy and not
at twice that. What is missing or too much is told together, with the likely cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from vla_edge.policy.checkpoint_files import CheckpointError, read_json
from vla_edge.policy.packed import find_packed

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
CONVERT = "tools/convert_weights.py"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = {"F64", "F32", "F16", "BF16"}
MIGRATE = (
    "it is of LeRobot before 0.4, which kept statistics inside the model: convert it with "
    "python -m lerobot.processor.migrate_policy_normalization"
)
_STATISTICS = ("normalize_inputs.", "unnormalize_outputs.", "normalize_targets.")
# what tells another kind of file apart: a part of its names -> what it is and what to do
_SIGNS = (
    (_STATISTICS, MIGRATE),
    ((".lora_A.", ".lora_B.", ".base_layer."), "it holds an adapter that was not merged; use vla-edge merge"),
    ((".qweight", ".weight_packed", ".absmax", ".weight_scale"), "it is quantized in a layout that is not "
     "known; give the weights it was made from"),
    (("vlm_with_expert.",), "it is a SmolVLA"),
    (("vision_backbone.featurizer",), "it is an OpenVLA"),
    (("backbone.model.model.visual.",), "it is a GR00T N1.7"),
    (("backbone.model.vision_model.",), "it is a GR00T N1.6"),
    (("backbone.eagle_model",), "it is a GR00T N1.5"),
)  # fmt: skip


class Weights(Mapping):
    """Name -> tensor of a checkpoint, for PyTorch. A weight that is stored rounded (`policy.packed`) is one tensor, as
    the others are.

    Args:
        files: safetensors files, of which no two hold the same tensor.
        rename: what a stored name becomes.
        parts: of the files, those of a part of the policy -> its name, put in front of those of its tensors.
        steps: instead of each number of a rounded weight the size of its step, and NaN for those of other matrices. What
            makes a policy's tensors of these makes its steps too: rows are chosen and multiplied alike.
    """

    def __init__(
        self,
        files: Iterable[Path],
        rename: Callable[[str], str] = str,
        parts: Mapping[Path, str] | None = None,
        steps: bool = False,
    ):
        self.files, self._steps = tuple(files), steps
        self._stack = ExitStack()
        self._places = {}
        for path in self.files:
            opened = self._stack.enter_context(open_tensors(path))
            part = f"{parts[path]}." if parts and parts.get(path) else ""
            self._places |= {part + rename(name): (name, opened) for name in opened.keys()}
        self._packed = find_packed(self._places)
        parts_of = {name for packed in self._packed.values() for name in packed.parts.values()}
        self._names = {name: None for name in (*(name for name in self._places if name not in parts_of), *self._packed)}

    def renamed(self, rename: Callable[[str], str], parts: Mapping[Path, str] | None = None) -> Weights:
        """The same under other names, with files of further parts."""
        return Weights((*self.files, *(parts or ())), rename, parts, self._steps)

    @property
    def rounded(self) -> bool:
        """Whether a weight is stored rounded."""
        return bool(self._packed)

    def __getitem__(self, name: str):
        if name in self._packed:
            unpacked = self._packed[name].unpack(self._stored, self.where)
            return unpacked.weight if not self._steps else unpacked.steps_of_each()
        tensor = self._stored(name)
        return tensor if not self._steps or tensor.ndim < 2 else tensor.new_full(tensor.shape, float("nan"))

    def _stored(self, name: str):
        stored, file = self._places[name]
        return file.get_tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self:
            raise self._refusal([name], [], self)
        if name in self._packed:
            return tuple(self[name].shape)
        stored, file = self._places[name]
        return tuple(file.get_slice(stored).get_shape())

    def matrices_in(self, kind: str) -> bool:
        """Whether all that has more than one dimension is stored as `kind`, a name of safetensors such as "BF16"."""
        slices = [file.get_slice(stored) for stored, file in self._places.values()]
        return all(part.get_dtype() == kind for part in slices if len(part.get_shape()) > 1)

    def count(self, pattern: str) -> int:
        """Layers: how many of `pattern`, with {} for the number, there are from 0 up.

        Raises:
            CheckpointError: there is none.
        """
        number = 0
        while pattern.format(number) in self:
            number += 1
        if not number:
            raise self._refusal([pattern.format(0)], [], self)
        return number

    def check(self, wanted: Iterable[str], unused: Callable[[str], bool] = lambda name: False) -> None:
        """Nothing, when exactly the `wanted` tensors are there, in floating point.

        Args:
            unused: whether a tensor may be there that nobody reads.

        Raises:
            CheckpointError: what is missing, what is too much, and the likely cause.
        """
        wanted = set(wanted)
        missing = sorted(wanted - set(self))
        unexpected = sorted(name for name in set(self) - wanted if not unused(name))
        if missing or unexpected:
            raise self._refusal(missing, unexpected, unexpected)
        for name in sorted(wanted - self._packed.keys()):
            stored, file = self._places[name]
            if (kind := file.get_slice(stored).get_dtype()) not in _FLOATS:
                raise CheckpointError(
                    f"{self.where} holds {name!r} as {kind}, where floating point belongs; give the weights it was "
                    "quantized from"
                )

    @property
    def where(self) -> Path:
        """The file, or the directory of the shards."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    def _refusal(self, missing: list[str], unexpected: list[str], telling: Iterable[str]) -> CheckpointError:
        """Args: telling: names among which signs of another kind of file are looked for."""
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"holds {_some(unexpected)}, which nothing reads"] if unexpected else []
        cause = next((told for signs, told in _SIGNS if any(sign in name for sign in signs for name in telling)), None)
        otherwise = "it is of an older layout or of another policy family than config.json says"
        return CheckpointError(f"{self.where} {' and '.join(parts)}; {cause or otherwise}")


class OnDemand(Mapping):
    """Name -> tensor, each made when it is asked for and not kept.

    Args:
        names: that there are. make: name -> tensor.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], object]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str):
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def find_weights(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint directory: model.safetensors, or the shards its index lists.

    Raises:
        CheckpointError: there are none, only pickles, or a shard is missing.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return (directory / WEIGHTS_FILE,)
    index = directory / INDEX_FILE
    if index.is_file():
        names = read_json(index)["weight_map"].values()
        shards = sorted({directory / str(name) for name in names})
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {_some(missing)} of the {len(shards)} shards that {INDEX_FILE} lists; copy the rest"
            )
        if shards:
            return tuple(shards)
        raise CheckpointError(f"{index} lists no shard; copy it again")
    if shards := sorted(directory.glob("model-*-of-*.safetensors")):
        raise CheckpointError(f"{directory} has {shards[0].name} but no {INDEX_FILE}; copy that too")
    pickled = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    hint = (
        f"a pickle may run code when it is opened: convert {pickled[0]} to safetensors with {CONVERT}"
        if pickled
        else "copy it from where the policy was trained"
    )
    raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}; {hint}")


def is_statistic(name: str) -> bool:
    """Whether a tensor is one of the statistics that older LeRobot kept inside the model."""
    return any(part in name for part in _STATISTICS)


def open_tensors(path: Path):
    """A safetensors file, mapped into memory, for PyTorch; a context manager.

    Raises:
        CheckpointError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
