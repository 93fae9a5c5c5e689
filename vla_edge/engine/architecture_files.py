"""Where shapes come from: a published policy by name (config/architectures), or a checkpoint directory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING

from vla_edge.engine.architectures import Architecture, Expert, Tower
from vla_edge.engine.operations import Decoder
from vla_edge.resources import share_directory
from vla_edge.types import VlaEdgeError

if TYPE_CHECKING:
    from vla_edge.policy.checkpoint import Checkpoint


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
    values = _entries(Architecture, plain, where)
    if values["kind"] not in ("flow", "tokens") or (values["kind"] == "flow") != ("expert" in values):
        raise ArchitectureError(f"{where}: kind is flow, with an expert, or tokens, without")
    values["towers"] = {
        name: Tower(**_entries(Tower, tower, f"{where}, tower {name}")) for name, tower in values["towers"].items()
    }
    values["language"] = Decoder(**_entries(Decoder, values["language"], f"{where}, language"))
    values["connector"] = tuple(map(tuple, values["connector"]))
    values["adapter"] = tuple(values["adapter"]) if values.get("adapter") else None
    if values.get("expert"):
        expert = _entries(Expert, values["expert"], f"{where}, expert")
        expert["shape"] = Decoder(**_entries(Decoder, expert["shape"], f"{where}, expert shape"))
        layers = range(expert["layers"])
        sides = {"even": tuple(layers[::2]), "odd": tuple(layers[1::2]), None: ()}
        if expert.get("cross") not in sides:
            raise ArchitectureError(f"{where}, expert: cross is {expert['cross']!r}, allowed is even, odd or nothing")
        values["expert"] = Expert(**{**expert, "cross": sides[expert.get("cross")]})
    return Architecture(**values)


def architecture_of(checkpoint: str | Path) -> Architecture:
    """The shapes of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
        ArchitectureError: it is of a family whose shapes are not told here.
    """
    from vla_edge.policy.checkpoint import load_checkpoint

    loaded = load_checkpoint(checkpoint)
    if loaded.family.name not in _OF_FAMILY:
        known = ", ".join(sorted(_OF_FAMILY))
        raise ArchitectureError(
            f"{loaded.directory} is {loaded.family.title}, whose shapes can be planned by name alone; checkpoints of {known} "
            f"are read, and there are the architectures {', '.join(architecture_names())}"
        )
    return _OF_FAMILY[loaded.family.name](loaded)


def _smolvla(loaded: Checkpoint) -> Architecture:
    from vla_edge.policy.smolvla_shapes import smolvla_config

    c = smolvla_config(loaded)
    grid = c.image_size // c.patch_size
    expert_layers = range(len(c.expert_layers))
    width = c.expert_width
    return Architecture(
        name=loaded.directory.parent.name or loaded.directory.name,
        kind="flow",
        source=str(loaded.directory),
        towers={
            "encoder": Tower(
                c.vision_layers, c.vision_width, c.vision_hidden, c.vision_heads, grid**2, 3 * c.patch_size**2
            )
        },
        connector=((c.vision_width * c.scale_factor**2, c.text_width),),
        image_tokens=c.image_tokens,
        language=Decoder(c.text_width, c.text_hidden, c.heads, c.kv_heads, c.head_dim),
        language_layers=c.text_layers,
        vocabulary=c.vocabulary,
        cameras=c.cameras,
        prompt_tokens=c.language_length,
        chunk=c.chunk_size,
        action_dim=len(loaded.spec.joint_names),
        steps=loaded.spec.num_steps,
        marker_tokens=len(c.image_start_ids) + len(c.image_end_ids),
        state_tokens=1,
        state_inputs=c.max_state_dim,
        every=c.expert_every,
        expert=Expert(
            Decoder(width, c.expert_hidden, c.heads, c.kv_heads, c.head_dim),
            len(expert_layers),
            cross=tuple(i for i in expert_layers if c.is_cross(c.expert_layers[i])),
            inputs={
                "action_in": (c.max_action_dim, width), "mlp_in": (width, width), "mlp_out": (width, width),
            },
            outputs={"action_out": (width, c.max_action_dim)},
            time={"mlp_in": (width, width)},
        ),
    )  # fmt: skip


def _groot(loaded: Checkpoint) -> Architecture:
    from vla_edge.policy.groot import TIME_CHANNELS
    from vla_edge.policy.groot_checkpoint import stored_config

    c = stored_config(loaded)
    width = c.width
    return Architecture(
        name=loaded.directory.parent.name or loaded.directory.name,
        kind="flow",
        source=str(loaded.directory),
        towers={
            "encoder": Tower(
                c.vision_layers, c.vision_width, c.vision_hidden, c.vision_heads, (c.image_size // c.patch_size) ** 2,
                3 * c.patch_size**2,
            )
        },
        connector=c.connector,
        image_tokens=c.image_tokens,
        language=Decoder(c.text_width, c.text_hidden, c.heads, c.kv_heads, c.head_dim),
        language_layers=c.text_layers,
        vocabulary=c.vocabulary,
        cameras=c.cameras,
        prompt_tokens=c.language_length - c.cameras,  # in whose places the pictures stand
        chunk=c.chunk_size,
        action_dim=len(loaded.spec.joint_names),
        steps=loaded.spec.num_steps,
        state={"state_in": (c.max_state_dim, c.state_hidden), "state_out": (c.state_hidden, width)},
        adapter=(c.adapter_layers, c.text_width, c.adapter_hidden, c.adapter_heads),
        expert=Expert(
            Decoder(width, c.layers_hidden, c.layers_heads, c.layers_heads, width // c.layers_heads, gated=False),
            c.layers,
            cross=c.cross_layers,
            cross_inputs=c.text_width,
            sees_prefix=False,
            extra_tokens=1 + c.future_tokens,
            outer=False,
            inputs={"action_in": (c.max_action_dim, width), "mlp_in": (width, width), "mlp_out": (width, width)},
            outputs={
                "proj_out": (width, c.output_width), "decoder": (c.output_width, c.decoder_hidden),
                "action_out": (c.decoder_hidden, c.max_action_dim),
            },
            time={
                "mlp_in": (TIME_CHANNELS, width), "mlp_out": (width, width), "action": (width, width),
                **{f"norms.{index}": (width, 2 * width) for index in range(c.layers + 1)},
            },
        ),
    )  # fmt: skip


_OF_FAMILY = {"smolvla": _smolvla, "groot": _groot}
"""Family -> checkpoint -> architecture."""


def _directory() -> Path:
    return share_directory() / "config" / "architectures"


def _entries(kind: type, plain, where: str) -> dict:
    if not isinstance(plain, Mapping):
        raise ArchitectureError(f"{where} is {plain!r}; it must map keys to values")
    known = {entry.name: entry for entry in fields(kind)}
    for key in plain:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)[0]
            raise ArchitectureError(f"{where} has the unknown key {key!r}; did you mean {nearest!r}?")
    for name, entry in known.items():
        if name not in plain and entry.default is MISSING and entry.default_factory is MISSING:
            raise ArchitectureError(f"{where} lacks {name}")
    return dict(plain)
