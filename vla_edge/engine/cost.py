"""How long operations take on a device: a roofline for GPUs, a sum of measured costs for CPUs (doc/planner.md).

Either gives the seconds of one call of a stage, split by what they go into, which is what a bottleneck is named by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vla_edge.engine.choose import SAVING_BY_ROUNDING, SAVING_PER_DOUBLING
from vla_edge.engine.native.attention import FEWEST_ROWS
from vla_edge.engine.operations import Attention, Convolution, GroupNorm, Pointwise, Product, Rotation, StageWork
from vla_edge.engine.precision import FLOAT_BYTES, LayerPrecision
from vla_edge.types import VlaEdgeError

WEIGHTS, COMPUTE, ATTENTION, CACHE, POINTWISE, SCHEDULING, HOST = (
    "weight bandwidth", "compute", "attention", "kv cache", "pointwise", "scheduling", "host work",
)  # fmt: skip
_ATTENTION_KERNELS = 7  # two products, a softmax, four copies of heads
_ROTATION = 8  # operators that a rotation is in ONNX: split, four products, difference, sum, concatenation
_GROUP_NORM = 10  # operators that one is in ONNX
_TILE = 16  # rows that tensor cores multiply at least
_PLACES = 16  # of a convolution, that a processor multiplies at a time


class CostError(VlaEdgeError):
    """An operation whose cost on a device is not known."""


class CostModel(Protocol):
    """Seconds of one call of a stage."""

    def call_seconds(
        self, work: StageWork, precisions: Mapping[str, LayerPrecision], kv_bits: int | None
    ) -> dict[str, float]:
        """What the call's time goes into -> s."""


@dataclass(frozen=True)
class Roofline:
    """A GPU: kernels one after the other, each bound by its products or by the bytes it moves, whichever takes longer.

    Attributes:
        peak: type -> operations per s that the hardware can do. compute: type -> share of it that kernels reach.
        bytes_per_s: of memory. bandwidth: share of it that kernels reach.
        floats: type that floats are multiplied in.
        kernel_s: between two kernels of a recorded graph.
        dispatch_s: that the host takes to launch one; kernels wait for it where it is longer than they are.
        weight_only: share of the products' speed that is left when 4-bit weights are unpacked for float inputs.
    """

    peak: Mapping[str, float]
    compute: Mapping[str, float]
    bytes_per_s: float
    bandwidth: float
    floats: str
    kernel_s: float = 0.0
    dispatch_s: float = 0.0
    weight_only: float = 1.0

    def call_seconds(
        self, work: StageWork, precisions: Mapping[str, LayerPrecision], kv_bits: int | None
    ) -> dict[str, float]:
        spent: dict[str, float] = {}
        kernels, width, before = 0, FLOAT_BYTES[self.floats], None
        speed = self.bytes_per_s * self.bandwidth
        for operation in work.operations:
            if isinstance(operation, Product):
                label, seconds = self._product(operation, precisions[operation.layer], width)
                kernels += 1
            elif isinstance(operation, Attention):
                label, seconds = self._attention(operation, (kv_bits or 8 * width) / 8, width)
                kernels += 1
            elif isinstance(operation, GroupNorm):
                label, seconds = POINTWISE, 3 * operation.numbers * width / speed  # means are taken before they are used
                kernels += 1
            else:
                # a kernel that rotates reads and writes each number
                rotates = isinstance(operation, Rotation)
                numbers = 2 * operation.numbers if rotates else operation.numbers
                label, seconds = POINTWISE, numbers * width / speed
                joined = not rotates and operation.joins and isinstance(before, Pointwise) and not self.dispatch_s
                kernels += operation.tensors if rotates else 0 if joined else operation.kernels
            before = operation
            spent[label] = spent.get(label, 0.0) + seconds
        busy = sum(spent.values()) + kernels * self.kernel_s
        waiting = max(0.0, kernels * self.dispatch_s - busy)
        spent[SCHEDULING] = kernels * self.kernel_s + waiting
        return spent

    def rate(self, kind: str) -> float:
        """Operations per s that kernels reach in type `kind`.

        Raises:
            CostError: none is known.
        """
        if kind not in self.peak or kind not in self.compute:
            raise CostError(f"no speed of {kind} products is known for this device and runtime; choose another recipe")
        return self.peak[kind] * self.compute[kind]

    def _product(self, product: Product, precision: LayerPrecision, width: int) -> tuple[str, float]:
        kind = precision.computes(self.floats)
        rate = self.rate(kind)
        if precision.inputs is None and precision.weights in ("int4", "nvfp4"):
            rate *= self.weight_only
        rows = math.ceil(product.rows / _TILE) * _TILE
        multiplied = precision.flops(rows, product.inputs, product.outputs) / rate
        moved = precision.nbytes(product.inputs, product.outputs) + width * product.moved
        loaded = moved / (self.bytes_per_s * self.bandwidth)
        return (COMPUTE, multiplied) if multiplied >= loaded else (WEIGHTS, loaded)

    def _attention(self, attention: Attention, cached: float, width: int) -> tuple[str, float]:
        multiplied = attention.flops / self.rate(self.floats)
        moved = attention.cached * cached + 2 * width * attention.queries
        loaded = moved / (self.bytes_per_s * self.bandwidth)
        # what was made just now is attention; keys and values of earlier tokens are the cache
        waits = CACHE if attention.rows < attention.keys else ATTENTION
        return (ATTENTION, multiplied) if multiplied >= loaded else (waits, loaded)


@dataclass(frozen=True)
class MeasuredSum:
    """A CPU: what a call does, counted, times what each costs on this computer.

    A runtime on few cores overlaps little, and a small policy spends as long between its operations as in them; so
    the costs add, and each was found by regression over blocks that were run here (`calibrate_device`).

    Attributes:
        seconds_per: threads -> feature of `features` -> s.
        caches: bytes of weights that stay near a processor from one call to the next, and that the last level holds;
            those of a stage that are more come from memory.
        bytes_per_s: threads -> that memory gives at most, whatever else goes on meanwhile; unlimited where not told.
    """

    seconds_per: Mapping[int, Mapping[str, float]]
    caches: tuple[float, float] = (8e6, 32e6)
    bytes_per_s: Mapping[int, float] = field(default_factory=dict)

    def call_seconds(
        self, work: StageWork, precisions: Mapping[str, LayerPrecision], kv_bits: int | None
    ) -> dict[str, float]:
        best: tuple[float, dict[str, float]] | None = None
        rounds = _rounds_inputs(work, precisions)
        for threads, costs in self.seconds_per.items():
            for way in WAYS:
                if way == OWN and not (_is_rounded(work, precisions) and costs.get("own int8") and costs.get("own int4")):
                    continue  # none for it, or none on this computer
                counted = features(work, precisions, self.caches, way)
                spent: dict[str, float] = {}
                for name, amount in counted.items():
                    label = LABELS[name]
                    spent[label] = spent.get(label, 0.0) + amount * costs.get(name, 0.0)
                least = sum(counted[f"loaded{kind}"] for kind in WAITS) / self.bytes_per_s.get(threads, math.inf)
                spent[WEIGHTS] = spent.get(WEIGHTS, 0.0) + max(0.0, least - sum(spent.values()))
                # the rules by which the backend takes more threads, and more rounding than a file asks for
                price = sum(spent.values()) / (1 - SAVING_PER_DOUBLING) ** math.log2(threads)
                price /= 1 - SAVING_BY_ROUNDING if way == ROUNDED or (way == OWN and rounds) else 1
                if best is None or price < best[0]:
                    best = price, spent
        return best[1]


PACKED, UNPACKED, ROUNDED, OWN = WAYS = ("packed", "unpacked", "rounded", "own")
"""How 4-bit weights are multiplied with float inputs: by ONNX Runtime unpacked in passing; unpacked when the file is
loaded; as integers with inputs that are rounded to 8 bits; and by kernels of our own (`engine.native`), which take 8-bit
weights and attention too."""

LABELS = {
    "float32": COMPUTE,
    "int8": COMPUTE,
    "int4": COMPUTE,
    "int4 row": COMPUTE,
    "unpacked": COMPUTE,
    "int4 rounded": COMPUTE,
    "int4 inputs": COMPUTE,
    "convolved": COMPUTE,
    "slid": COMPUTE,
    "filters": COMPUTE,
    "cached": WEIGHTS,
    "shared": WEIGHTS,
    "loaded": WEIGHTS,
    "shared row": WEIGHTS,
    "loaded row": WEIGHTS,
    "shared slid": WEIGHTS,
    "loaded slid": WEIGHTS,
    "rounded": POINTWISE,
    "attention": ATTENTION,
    "scores": ATTENTION,
    "curved": POINTWISE,
    "grouped": POINTWISE,
    "copied": POINTWISE,
    "own int8": COMPUTE,
    "own int4": COMPUTE,
    "own groups": COMPUTE,
    "own steps": POINTWISE,
    "own inputs": POINTWISE,
    "own attention": ATTENTION,
    "own scores": ATTENTION,
    "own heads": ATTENTION,
    "own curved": POINTWISE,
    "own copied": POINTWISE,
    "own kernels": SCHEDULING,
    "kernels": SCHEDULING,
    "call": SCHEDULING,
}
"""Feature of `features` -> what its time goes into."""


WAITS = ("", " row", " slid")
"""Behind "shared" and "loaded", of which products it is that wait for weights: of several rows, of one, and convolutions."""


def features(
    work: StageWork, precisions: Mapping[str, LayerPrecision], caches: tuple[float, float], way: str = PACKED
) -> dict[str, float]:
    """What one call of a stage does on a CPU, counted. `caches` as in `MeasuredSum`.

    ONNX Runtime multiplies integers only where 8-bit weights meet 8-bit inputs without groups; other weights are
    unpacked when a file is loaded, and 4-bit ones as `way` (of `WAYS`) says. Our kernels do what goes with 8-bit layers
    in passing.
    """
    counted = dict.fromkeys(LABELS, 0.0) | {"call": 1.0}
    own = "own " if way == OWN else ""
    passing = "own " if own and any(_is_own_int8(precisions[product.layer]) for product in work.products) else ""
    # a product of one row reads its weights in a stream, those of several wait for theirs, and convolutions wait longer
    weights = dict.fromkeys(WAITS, 0)
    for operation in work.operations:
        if isinstance(operation, Product):
            wait, read = _count_product(counted, operation, precisions[operation.layer], way)
            weights[wait] += read
        elif isinstance(operation, Attention):
            _count_attention(counted, operation, own)
        elif isinstance(operation, Pointwise):
            counted[f"{passing}curved"] += operation.curved
            counted[f"{passing}copied"] += operation.copied
            counted[f"{passing}kernels"] += operation.kernels
        elif isinstance(operation, GroupNorm):
            counted["grouped"] += operation.numbers
            counted["kernels"] += _GROUP_NORM
        elif isinstance(operation, Rotation):
            counted[f"{own}copied"] += (2 if own else _ROTATION) * operation.numbers
            counted[f"{own}kernels"] += (1 if own else _ROTATION) * operation.tensors
    near, whole = caches
    total = sum(weights.values())
    for kind, read in weights.items():
        counted["cached" if total <= near else f"shared{kind}" if total <= whole else f"loaded{kind}"] += read
    return counted


def _is_rounded(work: StageWork, precisions: Mapping[str, LayerPrecision]) -> bool:
    return any(precisions[product.layer].weights in ("int8", "int4") for product in work.products)


def _rounds_inputs(work: StageWork, precisions: Mapping[str, LayerPrecision]) -> bool:
    """Whether our kernels round inputs to 8 bits that the recipe leaves as they are."""
    used = [precisions[product.layer] for product in work.products]
    return any(precision.weights == "int4" or (_is_own_int8(precision) and precision.inputs is None) for precision in used)


def _is_own_int8(precision: LayerPrecision) -> bool:
    """Whether our kernel for 8-bit weights takes a layer: inputs on no grid of the recipe's."""
    return precision.weights == "int8" and precision.group is None and precision.inputs in (None, "int8-dynamic")


def _count_attention(counted: dict[str, float], attention: Attention, own: str) -> None:
    """Adds an attention; `own` before the names of what it is counted as where it is by our kernel."""
    if attention.rows * attention.heads // attention.kv_heads < FEWEST_ROWS:
        own = ""
    counted[f"{own}attention"] += attention.flops
    counted[f"{own}scores"] += attention.scores
    if own:  # in which queries, keys and values are rounded
        counted["own heads"] += attention.queries + attention.cached
        counted["own kernels"] += 1
        return
    # heads are brought forward and back by copies; a mask is one pass over the scores
    copied = 2 * (2 * attention.queries + attention.cached)
    counted["copied"] += copied + (2 * attention.scores if attention.masked else 0)
    counted["kernels"] += _ATTENTION_KERNELS + attention.masked


def _count_product(counted: dict[str, float], product: Product, precision: LayerPrecision, way: str) -> tuple[str, int]:
    """Adds a product; returns which of `WAITS` it is, and the bytes of its weights as they are multiplied."""
    size = (product.inputs, product.outputs)
    flops, packed = precision.flops(product.rows, *size), precision.nbytes(*size)
    slides = isinstance(product, Convolution) and _stays(precision)
    wait = " slid" if slides else " row" if product.rows == 1 else ""
    by_ours = _is_own_int8(precision) or precision.weights == "int4" and precision.inputs is None
    if way == OWN and by_ours and not slides:
        if isinstance(product, Convolution):
            _count_patches(counted, product)
        counted["own kernels"] += 1
        counted["own inputs"] += product.rows * product.inputs
        counted[f"own {precision.weights}"] += flops
        if precision.weights == "int4":  # each group of a row is rounded by itself, and its sums are brought to floats
            groups = product.rows * precision.groups(product.inputs)
            counted["own steps"] += groups
            counted["own groups"] += groups * product.outputs
        return wait, packed
    counted["kernels"] += 1
    kind, loaded = "float32", 4 * product.weights
    if slides:
        kind = "convolved" if len(product.kernel) > 1 else "slid"
        if kind == "slid":  # filters are gone through again for every few places
            counted["filters"] += product.weights * math.ceil(product.rows / _PLACES)
    elif isinstance(product, Convolution):
        _count_patches(counted, product)
    if precision.inputs is not None:
        counted["rounded"] += product.rows * product.inputs
    if precision.inputs in ("int8", "int8-dynamic") and precision.weights == "int8" and precision.group is None:
        kind, loaded = "int8", packed
    elif precision.weights == "int4" and way == ROUNDED:
        kind, loaded = "int4 rounded", packed
        counted["int4 inputs"] += product.rows * product.inputs
    elif precision.weights == "int4" and way in (PACKED, OWN):
        loaded = packed
        if product.rows == 1:  # has a kernel of its own, that holds nothing unpacked
            kind, flops = "int4 row", product.weights
        else:
            kind = "int4"
            counted["unpacked"] += product.weights
    counted[kind] += flops
    return wait, loaded


def _stays(precision: LayerPrecision) -> bool:
    """Whether a convolution is one in the file, as `engine.convolutions.is_direct` has it."""
    rounded = precision.weights not in FLOAT_BYTES
    return precision.inputs is None and not precision.rank and (
        not rounded or precision.weights == "int8" and precision.group is None
    )  # fmt: skip


def _count_patches(counted: dict[str, float], product: Convolution) -> None:
    """What it takes to lay patches out, one dimension after the other: of each a slice for every tap, and all joined."""
    made = product.seen
    for taps in product.kernel:
        made = min(made * taps, product.rows * product.inputs)
        counted["copied"] += 4 * made  # slices are written and read again
        counted["kernels"] += taps + 1
