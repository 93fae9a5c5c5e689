"""Where the files that come with the package lie: in a source checkout, in a colcon workspace, or on a robot."""

from __future__ import annotations

import os
from pathlib import Path

from vla_edge.types import VlaEdgeError

PACKAGE = "vla_edge"
_HERE = Path(__file__).resolve().parent


class ResourceError(VlaEdgeError):
    """A file that belongs to the package is not there."""


def share_directory() -> Path:
    """The directory that holds launch/, config/ and engines/.

    A source checkout is its own share directory. Otherwise it is the one the ament index names, read from
    AMENT_PREFIX_PATH as ament_index_python does; without a sourced environment, the one under the prefix this module
    was installed to.

    Raises:
        ResourceError: there is none.
    """
    source = source_checkout()
    if source is not None:
        return source
    for prefix in filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)):
        if Path(prefix, "share", "ament_index", "resource_index", "packages", PACKAGE).is_file():
            return Path(prefix, "share", PACKAGE)
    for prefix in _HERE.parents:
        if (prefix / "share" / PACKAGE / "package.xml").is_file():
            return prefix / "share" / PACKAGE
    raise ResourceError(
        f"The files that come with {PACKAGE} (launch, config, engines) are not beside {_HERE}: source the install/"
        "setup.bash of the workspace it was built in."
    )


def source_checkout() -> Path | None:
    """The checkout this code runs from, or None when it was installed."""
    top = _HERE.parent
    return top if (top / "package.xml").is_file() and (top / "launch").is_dir() else None


def shipped_checkpoint(name: str = "g1_tabletop") -> Path:
    """The checkpoint that comes with the package; it may be absent from a trimmed installation."""
    return share_directory() / "engines" / name / "checkpoint"


def bundles_directory(checkpoint: Path) -> Path:
    """Where engine bundles of a checkpoint are written: beside it, or in the user's cache where that is read-only."""
    beside = Path(checkpoint).resolve().parent
    if os.access(beside, os.W_OK):
        return beside / "bundles"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / PACKAGE / "bundles" / beside.name
