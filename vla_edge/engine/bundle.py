"""An engine on disk: one directory with the stage files, the tokenizer and a manifest that vouches for all of them.

    manifest.yaml  vision.onnx  prefix.onnx  time.onnx  denoise.onnx  tokenizer.json

A bundle is written into a temporary directory and renamed, so there is never half a bundle. Loading checks the schema,
every hash, the manifest's own digest and the joint order, and refuses with one sentence. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vla_edge.engine.backends import StageInterface
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.stages import TensorSpec
from vla_edge.types import VlaEdgeError

SCHEMA = 1
MANIFEST, TOKENIZER = "manifest.yaml", "tokenizer.json"
REQUIRED = ("schema", "name", "checkpoint", "policy", "joint_names", "dt", "recipe", "stages", "files", "versions", "digest")


class BundleError(VlaEdgeError):
    """A bundle that is missing, damaged, altered, or made for something else."""


@dataclass(frozen=True)
class StageEntry:
    """One stage as the manifest lists it.

    Attributes:
        file: relative to the bundle. backend, options: how to load it.
        precision: precision of the weights -> share of them.
        layers: layer -> shape and what it got.
        tried: ways of running it -> ms, what `options` were chosen from.
    """

    interface: StageInterface
    file: str
    backend: str
    options: Mapping
    precision: Mapping[str, float]
    layers: Mapping[str, Mapping]
    tried: Mapping[str, float] = field(default_factory=dict)

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
        manifest = _read_manifest(directory)
        for file, expected in manifest["files"].items():
            path = directory / file
            if Path(file).name != file or not path.is_file():
                raise BundleError(f"bundle {directory} lacks its file {file!r}; copy the whole directory or build it again")
            if sha256(path) != expected:
                raise BundleError(
                    f"{path} is not the file that was built (its SHA-256 differs from the manifest's); it was altered or "
                    "cut short: copy the bundle again or rebuild it"
                )
        try:
            spec = PolicySpec.from_dict(manifest["policy"])
            stages = tuple(StageEntry.from_dict(name, entry) for name, entry in manifest["stages"].items())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"{directory / MANIFEST} is malformed ({type(error).__name__} {error}); build the bundle again"
            ) from error
        for entry in (*(stage.file for stage in stages), TOKENIZER):
            if entry not in manifest["files"]:
                raise BundleError(f"{directory / MANIFEST} vouches for no file {entry!r}; build the bundle again")
        names = tuple(manifest["joint_names"])
        if names != spec.joint_names:
            raise BundleError(
                f"{directory / MANIFEST} lists the joints in another order than its policy ({_first_difference(names, spec.joint_names)}); "
                "build the bundle again"
            )
        if joint_names is not None and tuple(joint_names) != names:
            raise BundleError(
                f"bundle {directory} drives the joints in another order than expected "
                f"({_first_difference(names, tuple(joint_names))}); use the engine built for this robot"
            )
        return cls(directory, manifest, spec, stages)

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / TOKENIZER

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


@contextmanager
def writing(directory: str | Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` when the block ends well, and vanishes otherwise.

    Raises:
        BundleError: there is something at `directory` that is no bundle, or it cannot be written.
    """
    directory = Path(directory).expanduser().resolve()
    if directory.exists() and not (directory / MANIFEST).is_file() and (not directory.is_dir() or any(directory.iterdir())):
        raise BundleError(f"{directory} exists and is no engine bundle, so it is not replaced; choose another output")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".partial", dir=directory.parent))
    except OSError as error:
        raise BundleError(f"bundle {directory} cannot be written: {error}; choose another output") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(directory: Path, manifest: Mapping) -> dict:
    """Complete `manifest` with the hashes of all files and its own digest, and write it.

    Args:
        manifest: plain types; everything but `schema`, `files` and `digest`.
    """
    import yaml

    files = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    complete = {"schema": SCHEMA, **manifest, "files": files}
    complete["digest"] = digest(complete)
    text = yaml.dump(complete, Dumper=_dumper(), sort_keys=False, width=120, default_flow_style=None, allow_unicode=True)
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return complete


def digest(manifest: Mapping) -> str:
    """SHA-256 of a manifest without its digest, whatever its formatting."""
    plain = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()


def _read_manifest(directory: Path) -> dict:
    import yaml

    path = directory / MANIFEST
    if not directory.is_dir():
        raise BundleError(f"there is no bundle {directory}; build one with vla-edge build")
    if not path.is_file():
        raise BundleError(f"{directory} has no {MANIFEST}, so it is no engine bundle; build one with vla-edge build")
    try:
        manifest = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"{path} cannot be read ({reason}); copy the bundle again or rebuild it") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path} holds no manifest; copy the bundle again or rebuild it")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise BundleError(
            f"{path} is of schema {schema}, newer than {SCHEMA}, which this version reads; update vla_edge or rebuild"
        )
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise BundleError(f"{path} lacks {', '.join(missing)}; copy the bundle again or rebuild it")
    if schema != SCHEMA:
        raise BundleError(f"{path} is of schema {schema!r}, which this version does not read; rebuild the bundle")
    if digest(manifest) != manifest["digest"]:
        raise BundleError(f"{path} was altered after it was built (its digest differs); rebuild the bundle")
    return manifest


def _replace(temporary: Path, directory: Path) -> None:
    """Put `temporary` at `directory`; an older bundle there steps aside first, since a rename needs an empty place."""
    if not directory.exists():
        os.replace(temporary, directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".old", dir=directory.parent))
    try:
        os.replace(directory, aside / "bundle")
        os.replace(temporary, directory)
    except BaseException:
        if not directory.exists() and (aside / "bundle").exists():
            os.replace(aside / "bundle", directory)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _first_difference(found: Sequence[str], expected: Sequence[str]) -> str:
    for index, (a, b) in enumerate(zip(found, expected)):
        if a != b:
            return f"joint {index} is {a}, expected {b}"
    return f"{len(found)} joints, expected {len(expected)}"


def _dumper():
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
        """No anchors: the same value twice is written twice."""

        def ignore_aliases(self, data) -> bool:
            return True

    return Dumper
