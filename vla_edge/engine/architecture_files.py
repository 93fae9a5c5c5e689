"""The shapes of published policies, by name (config/architectures)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from vla_edge.engine.architectures import Architecture, Expert, Tower
from vla_edge.engine.described import entries
from vla_edge.engine.operations import Decoder
from vla_edge.resources import share_directory
from vla_edge.types import VlaEdgeError


class ArchitectureError(VlaEdgeError):
    """An architecture that is unknown, or a description of one that is not complete."""


def architecture_names() -> list[str]:
    """Those that ship."""
    return sorted(path.stem for path in _directory().glob("*.yaml"))


def load_architecture(name: str) -> Architecture:
    """The shipped architecture of that name.

    Raises:
        ArchitectureError: there is none, or its file is not complete.
    """
    import yaml

    path = _directory() / f"{name}.yaml"
    if not path.is_file():
        names = architecture_names()
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(names)}"
        raise ArchitectureError(f"there is no checkpoint directory and no architecture {name!r}; {hint}")
    return parse_architecture(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def parse_architecture(plain: Mapping, where: str) -> Architecture:
    """An architecture from plain types.

    Raises:
        ArchitectureError: an entry is missing or unknown.
    """
    values = entries(Architecture, plain, where, ArchitectureError)
    if values["kind"] not in ("flow", "tokens") or (values["kind"] == "flow") != ("expert" in values):
        raise ArchitectureError(f"{where}: kind is flow, with an expert, or tokens, without")
    values["towers"] = {
        name: Tower(**entries(Tower, tower, f"{where}, tower {name}", ArchitectureError))
        for name, tower in values["towers"].items()
    }
    values["language"] = Decoder(**entries(Decoder, values["language"], f"{where}, language", ArchitectureError))
    values["connector"] = tuple(map(tuple, values["connector"]))
    values["adapter"] = tuple(values["adapter"]) if values.get("adapter") else None
    if values.get("expert"):
        expert = entries(Expert, values["expert"], f"{where}, expert", ArchitectureError)
        expert["shape"] = Decoder(**entries(Decoder, expert["shape"], f"{where}, expert shape", ArchitectureError))
        layers = range(expert["layers"])
        sides = {"even": tuple(layers[::2]), "odd": tuple(layers[1::2]), None: ()}
        if expert.get("cross") not in sides:
            raise ArchitectureError(f"{where}, expert: cross is {expert['cross']!r}, allowed is even, odd or nothing")
        values["expert"] = Expert(**{**expert, "cross": sides[expert.get("cross")]})
    return Architecture(**values)


def _directory() -> Path:
    return share_directory() / "config" / "architectures"
