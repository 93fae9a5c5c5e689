"""What to do to a policy, as an ordered list that reads as prose.

    name: int8
    steps:
      - prune: {targets: [vision], method: wanda, sparsity: 0.3}
      - smooth: {targets: [vision]}
      - quantize: {targets: [vision, prefix], weights: int8, activations: int8, calibrator: mse}
      - keep: {targets: [denoise.action_out], dtype: float16}
    accept: {action_error_rel: 0.03, cosine: 0.995}

A target is a stage, a path below it, or a pattern of one ("vision.encoder.layers.*.mlp.up"); it means every layer
there. One that ends in "?" may match nothing, since not every family has every part. Layers that no step names stay in
float32. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from vla_edge.compress.steps import (
    STEPS,
    Decoding,
    KVCache,
    PruneTokens,
    Quantize,
    Shrink,
    Training,
    factors_convolutions,
)
from vla_edge.resources import share_directory
from vla_edge.types import VlaEdgeError


class RecipeError(VlaEdgeError):
    """A recipe that is missing, misspelled or contradicts itself."""


@dataclass(frozen=True)
class Accept:
    """Limits a build has to hold against full precision; a limit that is None is not checked.

    Attributes:
        action_error_rel: mean absolute difference of the chunks over the standard deviation of the motion, at most.
        cosine: cosine between the motions, all observations together, at least.
        relative_l2: norm of the difference over the norm of the motion, at most.
        joint_error_rad: mean absolute difference of the worst joint, rad, at most.
    """

    action_error_rel: float | None = None
    cosine: float | None = None
    relative_l2: float | None = None
    joint_error_rad: float | None = None

    def check(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
                raise ValueError(f"{entry.name} is {value!r}, allowed is a number, 0 or above")


@dataclass(frozen=True)
class Recipe:
    """An ordered list of steps and the limits of what may come of them."""

    name: str
    steps: tuple = ()
    accept: Accept = field(default_factory=Accept)
    description: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether a step looks at data."""
        return any(
            step.needs_statistics or isinstance(step, Quantize) and step.static_activations for step in self.steps
        )

    @property
    def reshapes(self) -> bool:
        """Whether stages come out of it with tensors of other shapes or types."""
        return any(
            isinstance(step, Shrink | PruneTokens | KVCache | Decoding) or factors_convolutions(step) for step in self.steps
        )

    @property
    def trains(self) -> bool:
        """Whether a step trains, for minutes or more."""
        return any(isinstance(step, Training) for step in self.steps)

    @property
    def changes_policy(self) -> bool:
        """Whether a step works in the policy itself, so that a copy has to be kept for comparison."""
        return any(step.changes_policy for step in self.steps)

    def to_dict(self) -> dict:
        """Plain types, for the manifest; `parse_recipe` reads them back."""
        steps = [{step.key: {key: _plain(value) for key, value in asdict(step).items()}} for step in self.steps]
        accept = {key: value for key, value in asdict(self.accept).items() if value is not None}
        return {"name": self.name, "description": self.description, "steps": steps, "accept": accept}

    def concise(self) -> dict:
        """As `to_dict`, without what need not be said: for people to read and edit."""
        plain = self.to_dict()
        for entry, step in zip(plain["steps"], self.steps):
            defaults = {field.name: field.default for field in fields(step)}
            entry[step.key] = {
                key: value
                for key, value in entry[step.key].items()
                if key == "weights" or value != _plain(defaults[key])
            }
        return plain


def load_recipe(source: str | Path) -> Recipe:
    """The shipped recipe of that name, or the one in a YAML file.

    Raises:
        RecipeError: there is none, or it is not valid.
    """
    import yaml

    path = Path(source).expanduser()
    shipped = recipe_directory()
    if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        path = shipped / f"{source}.yaml"
        if not path.is_file():
            names = sorted(file.stem for file in shipped.glob("*.yaml"))
            nearest = difflib.get_close_matches(str(source), names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(names)}"
            raise RecipeError(f"there is no recipe {str(source)!r}; {hint}")
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {path}; give a file or the name of a shipped recipe") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {' '.join(str(error).split())}; it must be YAML") from error
    return parse_recipe(plain, str(path), path.stem)


def parse_recipe(plain, where: str = "recipe", name: str = "custom") -> Recipe:
    """A recipe from plain types.

    Args:
        where: what to call it in errors. name: where it gives itself none.

    Raises:
        RecipeError: an unknown key, with the nearest valid one, or a value that is not allowed.
    """
    _mapping(plain, where)
    _known_keys(plain, ("name", "description", "steps", "accept"), where)
    steps = plain.get("steps", [])
    if not isinstance(steps, list):
        raise RecipeError(f"{where}: steps is a {type(steps).__name__}; it must be a list")
    parsed = []
    for number, step in enumerate(steps, 1):
        place = f"{where}, step {number}"
        _mapping(step, place)
        if len(step) != 1:
            raise RecipeError(
                f"{place} has the keys {', '.join(map(str, step))}; each step has one: {' or '.join(STEPS)}"
            )
        kind = next(iter(step))
        _known_keys(step, STEPS, place)
        parsed.append(_build(STEPS[kind], step[kind], f"{place} ({kind})"))
    accept = _build(Accept, plain.get("accept") or {}, f"{where}, accept")
    return Recipe(str(plain.get("name", name)), tuple(parsed), accept, str(plain.get("description", "")))


def recipe_directory() -> Path:
    """Where the shipped recipes are."""
    return share_directory() / "config" / "recipes"


def _build(kind: type, plain, where: str):
    _mapping(plain, where)
    known = [entry.name for entry in fields(kind)]
    _known_keys(plain, known, where)
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    for key in required:
        if key not in plain:
            raise RecipeError(f"{where} lacks {key}")
    values = dict(plain)
    if "targets" in known:
        values["targets"] = _targets(values["targets"], where)
    if "demonstrations" in values:
        values["demonstrations"] = _texts(values["demonstrations"], "demonstrations", where)
    step = kind(**values)
    try:
        step.check()
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    return step


def _targets(value, where: str) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not value or not all(isinstance(item, str) and item for item in value):
        raise RecipeError(f"{where}: targets is {value!r}; it must be a list of stages or layers, such as [vision]")
    return tuple(value)


def _texts(value, name: str, where: str) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not all(isinstance(item, str) and item for item in value):
        raise RecipeError(f"{where}: {name} is {value!r}; it must be a list of directories")
    return tuple(value)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _mapping(plain, where: str) -> None:
    if not isinstance(plain, Mapping):
        raise RecipeError(f"{where} is {plain!r}; it must map keys to values")


def _known_keys(plain: Mapping, known, where: str) -> None:
    for key in plain:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)[0]
            raise RecipeError(f"{where} has the unknown key {key!r}; did you mean {nearest!r}?")
