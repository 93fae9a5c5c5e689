"""An adapter as peft saves it (adapter_config.json, adapter_model.safetensors) -> what it does to each tensor.

LoRA (arXiv:2106.09685): W + s B A with s = alpha / r; rank-stabilized LoRA (arXiv:2312.03732): s = alpha / sqrt(r);
DoRA (arXiv:2402.09353): the rows of that sum scaled to learned lengths. A QLoRA adapter (arXiv:2305.14314) is a LoRA
adapter. Anything in the configuration or among the tensors that is not understood is refused, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json
from vla_edge.policy.weights import open_tensors

CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:(A\.weight|embedding_A)|(B\.weight|embedding_B)|(magnitude_vector)(?:\.weight)?)")
# what merging reads, and what matters for training alone; any other entry that is set changes the arithmetic
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "init_lora_weights", "lora_bias",
}  # fmt: skip
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "bias", "modules_to_save", "layers_to_transform",
    "layers_pattern", "eva_config", "velora_config", "megatron_core", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "corda_config", "lora_ga_config", "loftq_config",
}  # fmt: skip
# ways to begin that leave the base as it was; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ take from it what they begin with
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterError(CheckpointError):
    """An adapter that is damaged, was trained for another base, or does what merging cannot do."""


@dataclass(frozen=True)
class Factors:
    """Names of the tensors whose product is added to a weight.

    Attributes:
        a: (r, in, ...) or of an embedding (r, vocabulary). b: (out, r, ...) or (width, r).
        scale: of the product.
        magnitude: lengths (out) of the rows of the sum, by DoRA.
        transposed: the weight is stored (in, out), as embeddings are.
    """

    a: str
    b: str
    scale: float
    magnitude: str | None = None
    transposed: bool = False

    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(filter(None, (self.a, self.b, self.magnitude)))


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the base: first `whole` takes its place, then the factors' product is added.

    Attributes:
        whole: name of a trained tensor (of `bias`, `modules_to_save`).
        factors: of a weight.
        added: name and scale of what is added to a bias (`lora_bias`).
    """

    whole: str | None = None
    factors: Factors | None = None
    added: tuple[str, float] | None = None

    def names(self) -> tuple[str, ...]:
        """Every tensor of the adapter it takes."""
        return (
            *((self.whole,) if self.whole else ()),
            *(self.factors.names() if self.factors else ()),
            *((self.added[0],) if self.added else ()),
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter whose configuration and names have been understood and whose values are finite.

    Attributes:
        changes: tensor of the base -> what becomes of it.
        shapes: tensor of the adapter -> its shape.
    """

    directory: Path
    changes: Mapping[str, Change]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def weights_path(self) -> Path:
        """The safetensors file."""
        return self.directory / ADAPTER_FILE


def load_adapter(directory: str | Path) -> Adapter:
    """Read and check an adapter, one tensor at a time.

    Raises:
        CheckpointError, AdapterError: a file is missing or damaged, a value is not finite, or something is asked for
            that merging does not do.
    """
    import torch

    directory = Path(directory).expanduser().resolve()
    if not directory.is_dir():
        raise AdapterError(f"there is no adapter directory {directory}; give one that peft has written")
    config = read_json(directory / CONFIG_FILE)
    _check_supported(config)
    path = directory / ADAPTER_FILE
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = "convert adapter_model.bin to safetensors first" if pickled else "copy it from where it was trained"
        raise AdapterError(f"{directory} has no {ADAPTER_FILE}; {hint}")
    shapes = {}
    with open_tensors(path) as tensors:
        for name in tensors.keys():
            tensor = tensors.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{path} holds values that are not finite, first in {name}; take an earlier save")
            shapes[name] = tuple(tensor.shape)
    return Adapter(directory, _changes(config, path, shapes), shapes)


def _check_supported(config: Document) -> None:
    if config["peft_type"] != "LORA":
        raise AdapterError(
            f"{config.path} is of type {config['peft_type']!r}; LORA (with rank stabilization or DoRA) can be merged"
        )
    unknown = {key for key, value in config.items() if value} - _READ - _HARMLESS
    if unknown:
        key = min(unknown)
        raise AdapterError(
            f"{config.path} sets {key} to {config[key]!r}, which merging does not do; merge it with peft's "
            "merge_and_unload where it was trained, or train without it"
        )
    if (beginning := config.get("init_lora_weights", True)) not in _PLAIN_BEGINNINGS:
        raise AdapterError(
            f"{config.path} says init_lora_weights = {beginning!r}: it was trained on a base that this had changed; "
            "have peft save it with path_initial_model_for_weight_conversion, which makes it one of the base itself"
        )


def _changes(config: Document, path: Path, names: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
    """Tensor of the base -> what becomes of it."""
    parts: dict[str, list[str | None]] = {}
    biases: list[tuple[str, str]] = []
    changes: dict[str, Change] = {}
    for name in names:
        if not name.startswith(_PREFIX):
            raise AdapterError(f"{path} holds {name}, but peft's names begin with {_PREFIX}; save it with peft")
        inner = name.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(inner):
            parts.setdefault(match[1], [None] * 3)[match.lastindex - 2] = name
        elif inner.endswith(".lora_B.bias"):
            biases.append((inner.removesuffix(".lora_B.bias"), name))
        elif re.search(r"\.(lora_|token_adapter|modules_to_save)", inner):
            raise AdapterError(f"{path} holds {name}, which merging does not know; merge it with peft")
        else:
            # trained as a whole; what LoRA wraps is called base_layer inside
            changes[inner.replace(".base_layer.", ".")] = Change(whole=name)
    scales = {}
    for module, (a, b, magnitude) in parts.items():
        if a is None or b is None or bool(magnitude) != bool(config.get("use_dora")):
            lacking = "lora_A" if a is None else "lora_B" if b is None else "its magnitudes"
            told = f"lacks {lacking}" if not magnitude or config.get("use_dora") else "has magnitudes, but no use_dora,"
            raise AdapterError(f"layer {module} of {path} {told}; save the adapter again")
        scales[module] = _scale(config, path, module, names[a][0] if names[a] else 0)
        embedding = a.endswith("embedding_A")
        factors = Factors(a, b, scales[module], magnitude, embedding or bool(config.get("fan_in_fan_out")))
        weight = f"{module}.weight"
        changes[weight] = replace(changes.get(weight, Change()), factors=factors)
    for module, name in biases:
        if module not in scales:
            raise AdapterError(f"{path} holds {name} and no factors of that layer; save the adapter again")
        bias = f"{module}.bias"
        changes[bias] = replace(changes.get(bias, Change()), added=(name, scales[module]))
    if not changes:
        raise AdapterError(f"{path} changes nothing: it holds no tensors; save the adapter again")
    return changes


def _scale(config: Document, path: Path, module: str, rank: int) -> float:
    """Of the product of a layer's factors.

    Raises:
        AdapterError: configuration and tensors disagree about the rank, or alpha is no number.
    """
    said, alpha = (
        _of_module(config.get(f"{kind}_pattern") or {}, module, config[entry])
        for kind, entry in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if not isinstance(alpha, (int, float)):
        raise AdapterError(f"{config.path} says lora_alpha = {alpha!r} for {module}; it must be a number")
    if said != rank or rank < 1:
        raise AdapterError(
            f"layer {module} of {path} has rank {rank}, but {CONFIG_FILE} says {said}; take both from one save"
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _of_module(patterns: Mapping, module: str, otherwise):
    """The value of the first pattern that matches the end of a module's path."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
