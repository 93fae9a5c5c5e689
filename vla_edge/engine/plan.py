"""Shapes, a recipe and a device -> the time of every stage, rates and memory, before anything is built.

    works = architecture.works(workload)            what each stage computes
    precisions = layer_precisions(recipe, shapes)   what each layer is stored and multiplied in
    refuse(precisions, device, runtime)             what the device cannot do, said before a build
    seconds = model.call_seconds(work, ...)         how long a call takes, and what it goes into

doc/planner.md has the equations, where the numbers come from, and how far off they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vla_edge.compress.recipe import Recipe
from vla_edge.engine.architectures import Architecture
from vla_edge.engine.bottleneck import bottleneck_of
from vla_edge.engine.cost import HOST
from vla_edge.engine.devices import Device
from vla_edge.engine.operations import Attention, Product, StageWork, layer_shapes
from vla_edge.engine.precision import FLOAT_BYTES, LayerPrecision, asked_of_workload, layer_precisions
from vla_edge.engine.refusals import cautions, refuse
from vla_edge.engine.workload import KV_BITS, Workload
from vla_edge.types import VlaEdgeError


class PlanError(VlaEdgeError):
    """An engine that the device cannot run, with the reason."""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        calls: in one inference, each `per` something. call_ms: of one.
        spent_ms: what the stage's time in one inference goes into -> ms.
        gflop: of one call. weight_mb: bytes of its layers.
    """

    name: str
    calls: float
    per: str
    call_ms: float
    spent_ms: Mapping[str, float]
    gflop: float
    weight_mb: float

    @property
    def ms(self) -> float:
        """Of all calls."""
        return self.calls * self.call_ms


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes while it runs.

    Attributes:
        weights: part -> bytes: "vision", "language body" (its layers and the head over the vocabulary), "action head",
            "embeddings", "draft".
        cache: keys and values. activations: of the widest moment of any stage.
        available: of the device, without what it reserves.
    """

    weights: Mapping[str, int]
    cache: int
    activations: int
    available: float

    @property
    def engine(self) -> int:
        """All weights: what the bundle weighs."""
        return sum(self.weights.values())

    @property
    def running(self) -> int:
        return self.engine + self.cache + self.activations


@dataclass(frozen=True)
class Plan:
    """What to expect of an engine.

    Attributes:
        stages: those that run at each inference. host_ms: of decoding and resizing pictures.
        bottleneck, lever: what takes most of the time, and what to pull next.
        cautions: what is known to go wrong there, though not always.
    """

    architecture: str
    device: str
    runtime: str
    recipe: str
    workload: Workload
    stages: tuple[StagePlan, ...]
    host_ms: float
    memory: MemoryPlan
    actions: int
    bottleneck: str
    lever: str
    cautions: tuple[str, ...] = field(default=())

    @property
    def total_ms(self) -> float:
        """From pictures to the chunk."""
        return sum(stage.ms for stage in self.stages) + self.host_ms

    @property
    def chunk_rate_hz(self) -> float:
        """Inferences per second, one after the other."""
        return 1e3 / self.total_ms

    @property
    def action_rate_hz(self) -> float:
        """Actions per second, when every action of each chunk is carried out."""
        return self.chunk_rate_hz * self.actions

    @property
    def spent_ms(self) -> dict[str, float]:
        """What an inference's time goes into -> ms, most first."""
        spent: dict[str, float] = {HOST: self.host_ms}
        for stage in self.stages:
            for label, ms in stage.spent_ms.items():
                spent[label] = spent.get(label, 0.0) + ms
        return dict(sorted(spent.items(), key=lambda item: -item[1]))

    def stage(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)


def predict(
    architecture: Architecture,
    recipe: Recipe,
    device: Device,
    workload: Workload | None = None,
    runtime: str | None = None,
    group: int | None = None,
    runtimes: Mapping[str, str] | None = None,
    check_memory: bool = True,
) -> Plan:
    """What an engine of `architecture` compressed by `recipe` will do on `device`.

    Args:
        workload: the architecture's own when None. runtime: the device's own when None.
        group: of 4-bit weights, instead of the recipe's. runtimes: stage -> runtime, where stages differ.
        check_memory: refuse what does not fit.

    Raises:
        PlanError: the device or the runtime cannot do it, or it does not fit, with the reason.
        DeviceError, RecipeError, WorkloadError, CostError: what is asked for is wrong, or its cost is not known.
    """
    workload = workload or Workload.of(architecture, **asked_of_workload(recipe))
    runtime = runtime or device.runtime
    works = architecture.works(workload)
    precisions = layer_precisions(recipe, layer_shapes(works), group)
    chosen = {work.name: (runtimes or {}).get(work.name, runtime) for work in works}
    for work in works:
        mine = {product.layer: precisions[product.layer] for product in work.products}
        if reason := refuse(mine, device, chosen[work.name]):
            raise PlanError(f"{recipe.name} cannot run on {device.name}: {reason}")
    kv_bits = KV_BITS[workload.kv] if workload.kv else None
    stages = tuple(
        _stage(work, precisions, device.model(chosen[work.name]), kv_bits) for work in works if work.calls
    )
    memory = _memory(architecture, works, precisions, workload, device)
    if check_memory and memory.running > memory.available:
        raise PlanError(
            f"{architecture.name} by {recipe.name} takes {memory.running / 1e9:.1f} GB ({memory.engine / 1e9:.1f} of "
            f"weights) and {device.name} has {memory.available / 1e9:.1f} left for it; take fewer bits"
        )
    host = device.host_ms_per_camera * workload.cameras
    label, lever = bottleneck_of(stages, host, architecture, workload, recipe)
    actions = min(workload.chunk, architecture.executed or workload.chunk)
    return Plan(
        architecture.name, device.name, runtime, recipe.name, workload, stages, host, memory, actions, label, lever,
        tuple(cautions(precisions, device, chosen, architecture, workload)),
    )  # fmt: skip


def _stage(work: StageWork, precisions: Mapping[str, LayerPrecision], model, kv_bits: int | None) -> StagePlan:
    spent = model.call_seconds(work, precisions, kv_bits)
    layers = {product.layer: (product.inputs, product.outputs) for product in work.products}
    weights = sum(precisions[layer].nbytes(*shape) for layer, shape in layers.items())
    flops = sum(o.flops for o in work.operations if isinstance(o, Product | Attention))
    return StagePlan(
        work.name, work.calls, work.per, 1e3 * sum(spent.values()),
        {label: 1e3 * work.calls * seconds for label, seconds in spent.items() if seconds},
        flops / 1e9, weights / 1e6,
    )  # fmt: skip


def _memory(
    architecture: Architecture,
    works: tuple[StageWork, ...],
    precisions: Mapping[str, LayerPrecision],
    workload: Workload,
    device: Device,
) -> MemoryPlan:
    width = FLOAT_BYTES[device.floats]
    weights: dict[str, int] = {}
    for layer, shape in layer_shapes(works).items():
        part = architecture.part(layer)
        weights[part] = weights.get(part, 0) + precisions[layer].nbytes(*shape)
    if architecture.embedding_numbers:
        weights["embeddings"] = architecture.embedding_numbers * width
    bits = KV_BITS[workload.kv] if workload.kv else 8 * width
    cache = architecture.cache_numbers(workload) * bits // 8
    return MemoryPlan(weights, cache, max(map(_widest, works)) * width, device.bytes_for_engines)


def _widest(work: StageWork) -> int:
    """Numbers alive at the widest operation of a stage: what it reads, what it gives, and the stream beside it."""
    sizes = [0]
    for operation in work.operations:
        if isinstance(operation, Product):
            sizes.append(operation.rows * operation.inputs + operation.moved)
        elif isinstance(operation, Attention):
            sizes.append(int(4 * operation.queries + 2 * operation.scores))
    return max(sizes)

