"""What commands share."""

from __future__ import annotations

from vla_edge.types import VlaEdgeError

FAILED, WRONG_USE = 1, 2


class UsageError(VlaEdgeError):
    """Arguments that do not go together."""


def manifest_of(bundle, layers: bool) -> dict:
    """The manifest without the bulk that has a file or a flag of its own."""
    manifest = dict(bundle.manifest)
    if not layers:
        manifest["stages"] = {
            name: {key: value for key, value in entry.items() if key != "layers"}
            for name, entry in manifest["stages"].items()
        }
    return manifest
