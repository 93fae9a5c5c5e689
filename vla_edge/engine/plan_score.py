"""Efficiencies solved from published latencies, and scored on those that solved nothing.

config/published_latencies.yaml lists rows. A row that `solves` an efficiency of its device and runtime decides that one
number: the one with which the prediction meets it. The rest are held out: they are predicted, and the error is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vla_edge.compress.recipe import Recipe, parse_recipe
from vla_edge.engine.architecture_files import load_architecture
from vla_edge.engine.devices import Device, Efficiency, load_device
from vla_edge.engine.operations import layer_shapes
from vla_edge.engine.precision import layer_precisions
from vla_edge.engine.workload import Workload
from vla_edge.resources import share_directory

ROUNDS = 40  # each solves every number once, given the others
_HALVINGS = 30
_BOUNDS = {"bandwidth": (0.02, 1.0), "compute": (0.01, 1.0), "weight_only": (0.01, 1.0)}
_MOST_US = (0.0, 1000.0)


@dataclass(frozen=True)
class PublishedRow:
    """One published latency.

    Attributes:
        name: of the row. device, runtime, architecture: names. recipe: of `recipes` in the file.
        ms: what was published, by `source`. solves: efficiency that it decides, or None.
        workload: what differs from the architecture's own. runtimes: stage -> runtime where one differs.
        stages: that the figure is of, all when empty. call: stage of which it is one call.
        host: whether the host's work is in it.
        anchor: a figure that a user is likely to compare with; tests hold these to 25 %.
    """

    name: str
    device: str
    runtime: str
    architecture: str
    recipe: str
    ms: float
    source: str
    solves: str | None = None
    workload: Mapping[str, object] = field(default_factory=dict)
    runtimes: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    call: str | None = None
    host: bool = False
    anchor: bool = False


@dataclass(frozen=True)
class Score:
    """A row, predicted."""

    row: PublishedRow
    predicted_ms: float

    @property
    def error(self) -> float:
        """Predicted over published, minus 1."""
        return self.predicted_ms / self.row.ms - 1


@dataclass(frozen=True)
class Published:
    """The file: rows, the recipes they name, and what their sources are."""

    rows: tuple[PublishedRow, ...]
    recipes: Mapping[str, Recipe]
    sources: Mapping[str, str]


def load_published(path: Path | None = None) -> Published:
    """The shipped rows, or those of another file of the same form."""
    import yaml

    path = path or share_directory() / "config" / "published_latencies.yaml"
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = tuple(PublishedRow(**{**row, "stages": tuple(row.get("stages", ()))}) for row in plain["rows"])
    recipes = {name: parse_recipe(recipe, f"{path}, recipe {name}", name) for name, recipe in plain["recipes"].items()}
    return Published(rows, recipes, plain["sources"])


class Prediction:
    """What the planner says to `row`; evaluated many times while efficiencies are solved."""

    def __init__(self, row: PublishedRow, published: Published):
        self._row = row
        architecture = load_architecture(row.architecture)
        self._workload = Workload.of(architecture, **row.workload)
        works = architecture.works(self._workload)
        self._precisions = layer_precisions(published.recipes[row.recipe], layer_shapes(works))
        wanted = {row.call} if row.call else set(row.stages) or {work.name for work in works}
        self._works = [(1 if row.call else work.calls, work) for work in works if work.name in wanted and work.calls]

    def ms(self, device: Device) -> float:
        """On `device`."""
        row = self._row
        stages = sum(
            calls * sum(device.model(row.runtimes.get(work.name, row.runtime)).call_seconds(
                work, self._precisions, None
            ).values())
            for calls, work in self._works
        )  # fmt: skip
        return 1e3 * stages + (device.host_ms_per_camera * self._workload.cameras if row.host else 0.0)


def score(published: Published | None = None) -> list[Score]:
    """Every row, predicted with the shipped devices."""
    published = published or load_published()
    devices = {name: load_device(name) for name in {row.device for row in published.rows}}
    return [Score(row, Prediction(row, published).ms(devices[row.device])) for row in published.rows]


def solve(device: Device, published: Published) -> Device:
    """`device` with the efficiencies that its rows decide; the others stay, or follow the runtime they are like.

    Every row is solved by bisection for its own number, given the others, until none moves.
    """
    deciding = [row for row in published.rows if row.device == device.name and row.solves]
    for name in sorted(device.runtimes, key=lambda name: bool(device.runtimes[name].like)):
        if like := device.runtimes[name].like:
            device = _following(device, name, like)
        rows = [(row, Prediction(row, published)) for row in deciding if row.runtime == name]
        for _ in range(ROUNDS):
            before = device.runtimes[name]
            for row, prediction in rows:
                device = _solved(device, row, prediction)
            if _close(device.runtimes[name], before):
                break
    return device


def _following(device: Device, name: str, like: str) -> Device:
    """`device` whose runtime `name` has the numbers of `like`, but for those only it has."""
    own, other = device.runtimes[name], device.runtimes[like]
    compute = {kind: share for kind, share in other.compute.items() if kind in own.compute}
    new = replace(own, compute=compute, bandwidth=other.bandwidth, kernel_us=other.kernel_us)
    return replace(device, runtimes={**device.runtimes, name: new})


def _solved(device: Device, row: PublishedRow, prediction: Prediction) -> Device:
    low, high = _BOUNDS.get(row.solves.partition(".")[0], _MOST_US)
    rising = high > 1  # time grows with microseconds, and falls with shares
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if (prediction.ms(_with(device, row, middle)) > row.ms) == rising:
            high = middle
        else:
            low = middle
    return _with(device, row, (low + high) / 2)


def _with(device: Device, row: PublishedRow, value: float) -> Device:
    """`device` with the efficiency that `row` decides; the floats go together, since no row tells them apart."""
    old = device.runtimes[row.runtime]
    name, _, kind = row.solves.partition(".")
    if kind:
        kinds = [k for k in ("bfloat16", "float16", "float32") if k in old.compute] if kind == "bfloat16" else [kind]
        new = replace(old, compute={**old.compute, **dict.fromkeys(kinds, value)})
    else:
        new = replace(old, **{name: value})
    return replace(device, runtimes={**device.runtimes, row.runtime: new})


def _close(one: Efficiency, other: Efficiency) -> bool:
    return all(abs(a - b) <= 1e-4 * max(a, b, 1e-9) for a, b in zip(_numbers(one), _numbers(other)))


def _numbers(runtime: Efficiency) -> tuple[float, ...]:
    return (
        *runtime.compute.values(), runtime.bandwidth, runtime.kernel_us, runtime.dispatch_us, runtime.weight_only,
    )  # fmt: skip
