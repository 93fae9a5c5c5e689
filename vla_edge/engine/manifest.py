"""The manifest of a bundle: plain data that vouches for every file beside it and for itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from vla_edge.files import sha256
from vla_edge.types import VlaEdgeError

SCHEMA = 1
MANIFEST, TOKENIZER = "manifest.yaml", "tokenizer.json"
REQUIRED = (
    "schema",
    "name",
    "checkpoint",
    "policy",
    "joint_names",
    "dt",
    "recipe",
    "stages",
    "files",
    "versions",
    "digest",
)


class BundleError(VlaEdgeError):
    """A bundle that is missing, damaged, altered, or made for something else."""


def write_manifest(directory: Path, manifest: Mapping) -> dict:
    """Complete `manifest` with the hashes of all files and its own digest, and write it.

    Args:
        manifest: plain types; everything but `schema`, `files` and `digest`.
    """
    import yaml

    files = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    complete = {"schema": SCHEMA, **manifest, "files": files}
    complete["digest"] = digest(complete)
    text = yaml.dump(
        complete, Dumper=_dumper(), sort_keys=False, width=120, default_flow_style=None, allow_unicode=True
    )
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return complete


def digest(manifest: Mapping) -> str:
    """SHA-256 of a manifest without its digest, whatever its formatting."""
    plain = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def read_manifest(directory: Path) -> dict:
    """The manifest in `directory`, its schema, keys and digest checked; not yet the files.

    Raises:
        BundleError: what is wrong, where, and what to do.
    """
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


def _dumper():
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
        """No anchors: the same value twice is written twice."""

        def ignore_aliases(self, data) -> bool:
            return True

    return Dumper
