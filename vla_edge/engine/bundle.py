"""An engine on disk: one directory with the stage files, the tokenizer and a manifest that vouches for all of them.

    manifest.yaml  vision.onnx  prefix.onnx  time.onnx  denoise.onnx  tokenizer.json

A bundle is written into a temporary directory and renamed, so there is never half a bundle. Loading checks the schema,
every hash, the manifest's own digest and the joint order, and refuses with one sentence. Nothing in it is code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vla_edge.engine.backends import LoadedStage, StageInterface, get_backend
from vla_edge.engine.manifest import MANIFEST, TOKENIZER, BundleError, read_manifest
from vla_edge.files import sha256, whole_directory
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.stages import TensorSpec

__all__ = ["Bundle", "BundleError", "StageEntry", "load_entries", "writing"]


@dataclass(frozen=True)
class StageEntry:
    """One stage as the manifest lists it.

    Attributes:
        file: relative to the bundle. backend, options: how to load it.
        precision: precision of the weights -> share of them.
        layers: layer -> shape and what it got.
        tried: ways of running it -> ms, what `backend` and `options` were chosen from. refused: way -> why it was not.
    """

    interface: StageInterface
    file: str
    backend: str
    options: Mapping
    precision: Mapping[str, float]
    layers: Mapping[str, Mapping]
    tried: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain types for the manifest."""
        tensors = {
            side: [{"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype} for spec in specs]
            for side, specs in (("inputs", self.interface.inputs), ("outputs", self.interface.outputs))
        }
        return {
            "file": self.file,
            "backend": self.backend,
            "options": dict(self.options),
            "tried_ms": dict(self.tried),
            "refused": dict(self.refused),
            "precision": {name: round(share, 4) for name, share in self.precision.items()},
            **tensors,
            "layers": {name: dict(row) for name, row in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, name: str, plain: Mapping) -> StageEntry:
        """Inverse of `to_dict`."""
        sides = (
            tuple(TensorSpec(spec["name"], tuple(spec["shape"]), spec["dtype"]) for spec in plain[side])
            for side in ("inputs", "outputs")
        )
        return cls(
            StageInterface(name, *sides),
            plain["file"],
            plain["backend"],
            plain["options"],
            plain["precision"],
            plain["layers"],
            plain.get("tried_ms", {}),
            plain.get("refused", {}),
        )


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have all been checked.

    Attributes:
        directory: absolute.
        manifest: as read.
        spec: the policy. stages: in the order of computation.
    """

    directory: Path
    manifest: Mapping
    spec: PolicySpec
    stages: tuple[StageEntry, ...]

    @classmethod
    def load(cls, directory: str | Path, joint_names: Sequence[str] | None = None) -> Bundle:
        """Read and check a bundle.

        Args:
            joint_names: order of joints the caller relies on; not compared when None.

        Raises:
            BundleError: what is wrong, where, and what to do.
        """
        directory = Path(directory).expanduser().resolve()
        manifest = read_manifest(directory)
        for file, expected in manifest["files"].items():
            path = directory / file
            if Path(file).name != file or not path.is_file():
                raise BundleError(
                    f"bundle {directory} lacks its file {file!r}; copy the whole directory or build it again"
                )
            if sha256(path) != expected:
                raise BundleError(
                    f"{path} is not the file that was built (its SHA-256 differs from the manifest's); it was altered "
                    "or cut short: copy the bundle again or rebuild it"
                )
        try:
            spec = PolicySpec.from_dict(manifest["policy"])
            stages = tuple(StageEntry.from_dict(name, entry) for name, entry in manifest["stages"].items())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"{directory / MANIFEST} is malformed ({type(error).__name__} {error}); build the bundle again"
            ) from error
        for entry in (*(stage.file for stage in stages), *((TOKENIZER,) if spec.reads_instruction else ())):
            if entry not in manifest["files"]:
                raise BundleError(f"{directory / MANIFEST} vouches for no file {entry!r}; build the bundle again")
        names = tuple(manifest["joint_names"])
        if names != spec.joint_names:
            raise BundleError(
                f"{directory / MANIFEST} lists the joints in another order than its policy "
                f"({_first_difference(names, spec.joint_names)}); build the bundle again"
            )
        if joint_names is not None and tuple(joint_names) != names:
            raise BundleError(
                f"bundle {directory} drives the joints in another order than expected "
                f"({_first_difference(names, tuple(joint_names))}); use the engine built for this robot"
            )
        return cls(directory, manifest, spec, stages)

    @property
    def tokenizer_path(self) -> Path | None:
        return self.directory / TOKENIZER if self.spec.reads_instruction else None

    @cached_property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.directory.iterdir() if path.is_file())

    def description(self) -> dict:
        """A few plain figures for status messages and reports."""
        manifest = self.manifest
        return {
            "name": manifest["name"],
            "backend": "+".join(dict.fromkeys(stage.backend for stage in self.stages)),
            "precision": manifest["recipe"]["name"],
            "bytes": self.bytes,
            "digest": manifest["digest"][:12],
            "checkpoint": manifest["checkpoint"]["fingerprint"][:12],
        }


def load_entries(entries: Sequence[StageEntry], directory: Path, threads: int | None = None) -> dict[str, LoadedStage]:
    """Stage -> ready to run.

    Raises:
        BackendError: a runtime is not installed, or cannot load its stage.
    """
    return {
        entry.interface.name: get_backend(entry.backend).load(
            directory / entry.file, entry.interface, entry.options, threads
        )
        for entry in entries
    }


@contextmanager
def writing(directory: str | Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` when the block ends well, and vanishes otherwise.

    Raises:
        BundleError: there is something at `directory` that is no bundle, or it cannot be written.
    """
    directory = Path(directory).expanduser().resolve()
    if (
        directory.exists()
        and not (directory / MANIFEST).is_file()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise BundleError(f"{directory} exists and is no engine bundle, so it is not replaced; choose another output")
    with whole_directory(directory, BundleError) as temporary:
        yield temporary


def _first_difference(found: Sequence[str], expected: Sequence[str]) -> str:
    for index, (a, b) in enumerate(zip(found, expected)):
        if a != b:
            return f"joint {index} is {a}, expected {b}"
    return f"{len(found)} joints, expected {len(expected)}"
