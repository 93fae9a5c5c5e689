"""A checkpoint directory -> a `PolicySpec` and, when asked, the policy with its weights.

What lies in the directory is told by the family's module (`families`): LeRobot's `pretrained_model/`, a Hugging Face
directory with shards, or what openpi's conversion to PyTorch writes. Beside it lies `vla_edge.json` with what a robot
must know and none of them says: joint names, time between points, whether actions are offsets, and how each camera's
frames are cropped. doc/checkpoint.md lists every entry.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vla_edge.files import sha256
from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json, read_tokenizer
from vla_edge.policy.families import Family, family_of
from vla_edge.policy.robot_facts import ROBOT_FILE
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.weights import WEIGHTS_FILE, Weights, find_weights

__all__ = [
    "ROBOT_FILE", "WEIGHTS_FILE", "Checkpoint", "CheckpointError", "fingerprint", "load_checkpoint", "load_policy",
]  # fmt: skip

_CHECKED = 1 << 22  # values at a time


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose small files have been read and agree with each other.

    Attributes:
        directory: absolute.
        family: how it is loaded.
        config: config.json. backbone: the backbone's, where the family has one.
        spec: what serving needs.
        weights: its safetensors files.
        fingerprint: SHA-256 over every file's relative name and content, hexadecimal.
    """

    directory: Path
    family: Family
    config: Document
    backbone: Document | None
    spec: PolicySpec
    tokenizer_path: Path | None
    weights: tuple[Path, ...]
    fingerprint: str

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(path.stat().st_size for path in self.weights)


def load_checkpoint(directory: str | Path) -> Checkpoint:
    """Read and check everything but the weights.

    Raises:
        CheckpointError: what is missing or wrong, in which file, and what to do.
    """
    directory = Path(directory).expanduser().resolve()
    if not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {directory}; give one in LeRobot's layout")
    config = read_json(directory / "config.json")
    family = family_of(config)
    weights = find_weights(directory)
    try:
        described = family.module.describe(directory, config)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory} does not describe {family.title} that can be served: {error}; "
            f"compare config.json and {ROBOT_FILE} with doc/checkpoint.md"
        ) from error
    if described.tokenizer_path is not None:
        read_tokenizer(described.tokenizer_path)
    return Checkpoint(
        directory, family, config, described.backbone, described.spec, described.tokenizer_path, weights,
        fingerprint(directory, *filter(None, (described.tokenizer_path, getattr(described.backbone, "path", None)))),
    )  # fmt: skip


def load_policy(checkpoint: Checkpoint):
    """The policy in float32 on the CPU, in eval mode. Of what the files hold, one tensor at a time is in memory.

    Raises:
        CheckpointError: the weights are damaged, incomplete, of another shape, or not finite.
    """
    policy, weights = build_policy(checkpoint), Weights(checkpoint.weights)
    try:
        policy.load_state_dict(checkpoint.family.module.tensors(policy, checkpoint, weights))
    except (IndexError, RuntimeError, ValueError) as error:
        raise unfit(weights, error) from error
    for name, tensor in policy.state_dict().items():
        check_finite(weights, name, tensor)
    return policy.float().eval()


def build_policy(checkpoint: Checkpoint):
    """The policy's modules, of the checkpoint's shapes and not of its values.

    Raises:
        CheckpointError: its files contradict each other.
    """
    try:
        with uninitialized():
            return checkpoint.family.module.build(checkpoint, Weights(checkpoint.weights))
    except (AttributeError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the files of {checkpoint.directory} do not give the shapes of {checkpoint.family.title}: {error}; "
            "copy all of them from where the policy was trained"
        ) from error


def unfit(weights: Weights, error: Exception) -> CheckpointError:
    """For tensors of another shape than the policy's."""
    return CheckpointError(
        f"{weights.where} does not fit config.json and the backbone's: {str(error).splitlines()[-1].strip()}; "
        "take all three from the same training run"
    )


def check_finite(weights: Weights, name: str, tensor) -> None:
    """Raises CheckpointError: a value of the parameter is not finite."""
    # a part at a time: what PyTorch makes of it meanwhile is larger than the tensor
    if not all(part.isfinite().all() for part in tensor.flatten().split(_CHECKED)):
        raise CheckpointError(f"{weights.where} holds values that are not finite, first in {name}; take an earlier save")


def uninitialized():
    """A context in which `torch.nn` fills no parameter: of billions, that would take longer than to read them."""
    from torch.overrides import TorchFunctionMode

    class Uninitialized(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
            return function(*args, **(kwargs or {}))

    return Uninitialized()


def fingerprint(directory: Path, *others: Path) -> str:
    """SHA-256 over the names and contents of all files below `directory`, and of `others` that lie elsewhere."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
        digest.update(bytes.fromhex(sha256(path)))
    for path in others:
        if not path.is_relative_to(directory):
            digest.update(path.name.encode() + b"\0" + bytes.fromhex(sha256(path)))
    return digest.hexdigest()
