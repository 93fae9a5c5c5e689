"""The simulated worlds: what demonstrations, training and the closed loop have to know of each, by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vla_edge.policy.spec import CameraSpec
from vla_edge.types import VlaEdgeError

if TYPE_CHECKING:
    from vla_edge.sim.demonstrations import Demonstrator


class WorldError(VlaEdgeError):
    """There is no such world, or no such tier in it."""


@dataclass(frozen=True)
class World:
    """One world.

    Attributes:
        name: as commands take it.
        tiers: what its episodes can be drawn from; the first where none is named.
        unit: of its joints' positions.
        joint_names: J, in the order of demonstrations.
        dt: s between points of a chunk. chunk: points of one.
        camera: what the policy trained here sees.
        vocabulary: every word of every instruction, in the order of the tokenizer.
        demonstrator: sets the world up with its expert.
        needed: raises the error that names what is not installed, if something is not.
    """

    name: str
    tiers: tuple[str, ...]
    unit: str
    joint_names: tuple[str, ...]
    dt: float
    chunk: int
    camera: CameraSpec
    vocabulary: tuple[str, ...]
    demonstrator: Callable[[], Demonstrator]
    needed: Callable[[], object]

    def tier(self, name: str | None) -> str:
        """`name`, or the first tier where it is None. Raises WorldError where there is none of that name."""
        if name is None:
            return self.tiers[0]
        if name not in self.tiers:
            raise WorldError(f"the world {self.name} has no tier {name!r}; it is one of {', '.join(self.tiers)}")
        return name


def _tabletop() -> World:
    from vla_edge.robots.g1 import DRIVEN_JOINTS
    from vla_edge.sim.assets import g1_model_path
    from vla_edge.sim.expert import DT
    from vla_edge.sim.tabletop_demonstrations import CHUNK, IMAGE_SIZE, TabletopDemonstrator
    from vla_edge.sim.tasks import TIERS, vocabulary

    camera = CameraSpec("head", "observation.images.head", 480, 640, (0, 80, 480, 480), IMAGE_SIZE, IMAGE_SIZE)
    return World(
        "tabletop", TIERS, "rad", DRIVEN_JOINTS, DT, CHUNK, camera, vocabulary(), TabletopDemonstrator, g1_model_path
    )  # fmt: skip


def _metaworld() -> World:
    from vla_edge.sim.metaworld import CAMERA, JOINTS, PICTURE, TIERS, library, vocabulary
    from vla_edge.sim.metaworld_demonstrations import CHUNK, CROP, DT, MetaWorldDemonstrator

    camera = CameraSpec(CAMERA, f"observation.images.{CAMERA}", PICTURE, PICTURE, CROP, *CROP[2:])
    return World(
        "metaworld", TIERS, "m", JOINTS, DT, CHUNK, camera, vocabulary(), MetaWorldDemonstrator, library
    )  # fmt: skip


WORLDS: dict[str, Callable[[], World]] = {"tabletop": _tabletop, "metaworld": _metaworld}


def world(name: str) -> World:
    """The world called `name`. Raises WorldError."""
    if name not in WORLDS:
        raise WorldError(f"there is no world {name!r}; it is one of {', '.join(WORLDS)}")
    return WORLDS[name]()
