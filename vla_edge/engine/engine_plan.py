"""Plans from what a user has in hand: a checkpoint or a published policy's name, a recipe or a bundle, a device's name."""

from __future__ import annotations

from pathlib import Path

from vla_edge.compress.recipe import Recipe, load_recipe, parse_recipe
from vla_edge.engine.architecture_files import load_architecture
from vla_edge.engine.architectures import Architecture
from vla_edge.engine.counted import CountedPolicy
from vla_edge.engine.devices import LOCAL, Device, load_device
from vla_edge.engine.manifest import MANIFEST, read_manifest
from vla_edge.engine.plan import Plan, predict
from vla_edge.engine.plan_search import Candidate, candidates
from vla_edge.engine.precision import asked_of_workload
from vla_edge.engine.workload import Workload


def policy_shapes(policy: str | Path) -> Architecture | CountedPolicy:
    """Of a checkpoint directory, or of a published policy by name.

    Raises:
        ArchitectureError, CheckpointError: it is neither.
    """
    from vla_edge.engine.checkpoint_shapes import architecture_of

    directory = Path(policy).expanduser()
    return architecture_of(directory) if directory.is_dir() else load_architecture(str(policy))


def recipe_of(recipe: str | Path | Recipe) -> Recipe:
    """A recipe as `load_recipe` takes it, or that by which a bundle was built, given its directory.

    Raises:
        RecipeError, BundleError: it cannot be read.
    """
    if isinstance(recipe, Recipe):
        return recipe
    directory = Path(recipe).expanduser()
    if (directory / MANIFEST).is_file():
        told = read_manifest(directory)["recipe"]
        return parse_recipe(told, str(directory / MANIFEST), told["name"])
    return load_recipe(recipe)


def engine_plan(
    policy: str | Path,
    recipe: str | Path | Recipe,
    device: str | Path | Device = LOCAL,
    runtime: str | None = None,
    group: int | None = None,
    check_memory: bool = True,
    **asked,
) -> Plan:
    """What an engine will do.

    Args:
        policy: as `policy_shapes`. recipe: as `recipe_of`.
        device: as `load_device`, or loaded; this computer is measured at its first plan.
        runtime, group, check_memory: as `predict`. asked: of the inference, by the fields of `Workload`, such as
            decoding="fixed-point", iterations=3.

    Raises:
        PlanError, VlaEdgeError: it cannot be planned, and why.
    """
    architecture, recipe, device, workload = _read(policy, recipe, device, asked)
    return predict(architecture, recipe, device, workload, runtime, group, check_memory=check_memory)


def engine_schemes(
    policy: str | Path,
    recipe: str | Path | Recipe,
    device: str | Path | Device = LOCAL,
    runtime: str | None = None,
    group: int | None = None,
    **asked,
) -> list[Candidate]:
    """The same engine under every scheme it can be asked for: decodings or flow steps, all vision tokens or half of them.
    `plan_report.search_text` tells them. Arguments and errors as `engine_plan`; what a device cannot do is a candidate
    with a reason in the place of its plan."""
    architecture, recipe, device, workload = _read(policy, recipe, device, asked)
    return list(candidates(architecture, device, workload, runtime, group, (recipe,)))


def _read(policy, recipe, device, asked: dict) -> tuple:
    architecture, recipe = policy_shapes(policy), recipe_of(recipe)
    device = device if isinstance(device, Device) else load_device(device)
    return architecture, recipe, device, Workload.of(architecture, **{**asked_of_workload(recipe), **asked})
