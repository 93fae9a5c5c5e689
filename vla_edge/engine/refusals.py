"""What a device or a runtime cannot do, known before a build: a table of rules, each with its reason.

A refusal is about hardware or about what a runtime's documentation rules out, and holds always. A caution is about
builds that others have seen fail, and may not hold for yours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vla_edge.engine.precision import FLOAT_BYTES, LayerPrecision

if TYPE_CHECKING:
    from vla_edge.engine.architectures import Architecture
    from vla_edge.engine.devices import Device
    from vla_edge.engine.workload import Workload

TENSORRT, EAGER = "tensorrt", "eager"


@dataclass(frozen=True)
class Rule:
    """When `applies(precision, device, runtime)`, `because` is why, and `instead` what to take."""

    applies: Callable[[LayerPrecision, Device, str], bool]
    because: str
    instead: str


RULES = (
    Rule(
        lambda p, d, r: 0 < d.capability < 89 and "fp8" in (p.weights, p.inputs),
        "GPUs before compute capability 8.9 (SM89, Ada) have no FP8 products",
        "take int8-static, or int4 weights",
    ),
    Rule(
        lambda p, d, r: 0 < d.capability < 100 and p.weights == "nvfp4",
        "GPUs before compute capability 10.0 (SM100, Blackwell) have no FP4 products",
        "take int4 weights",
    ),
    Rule(
        lambda p, d, r: r == TENSORRT and p.inputs == "int8-dynamic",
        "TensorRT rounds inputs to symmetric grids that calibration fixes, and this recipe finds unsigned ones at each "
        "call",
        "take int8-static",
    ),
    Rule(
        lambda p, d, r: r == TENSORRT and p.weights == "int4" and p.inputs is not None,
        "TensorRT has no products of 4-bit integers with rounded inputs: it unpacks them and multiplies in 16 bits",
        "take int4 weights with float inputs, or int8-static",
    ),
    Rule(
        lambda p, d, r: r == EAGER and p.weights not in FLOAT_BYTES,
        "PyTorch eager runs the policy's own float weights",
        "take bf16, or another runtime",
    ),
)
_QDQ = (
    "INT8 QDQ files are reported not to build on SM87: Myelin cannot type a dequantize (NVIDIA/TensorRT #4832, "
    "10.16), and INT8 calibration fails an assertion (#4797, 10.3). Build a stage alone first and keep a 16-bit one"
)
_SYMMETRIC = (
    "TensorRT takes signed INT8 inputs on symmetric grids alone; files with unsigned ones, which CPUs prefer, do not "
    "build"
)
_LANGUAGE = (
    "TensorRT 10.3 could not build the language model of GR00T N1.7 (Isaac-GR00T runs it in PyTorch on Orin): build "
    "the {stage} stage alone first"
)
_DOUBLED = (
    "{share:.0%} of the layers are kept in float32, for which tensor cores have no products: keep them in bfloat16"
)
TRAINING = "has to be trained for it"
_PARALLEL = (
    "{name} was trained to decode one token after the other; to give all in one pass it {training}, as OpenVLA-OFT is"
)
_ASSUMED = "{share:.0%} of drafted tokens are taken to be accepted; measure it with your draft"
LARGE_LANGUAGE = 4e8  # parameters of its feed-forwards


def refuse(precisions: Mapping[str, LayerPrecision], device: Device, runtime: str) -> str | None:
    """Why `device` cannot run these layers with `runtime`, and what to take instead; None when it can."""
    for layer, precision in precisions.items():
        for rule in RULES:
            if rule.applies(precision, device, runtime):
                return f"{rule.because} (first {layer}, {_words(precision)}); {rule.instead}"
    return None


def cautions(
    precisions: Mapping[str, LayerPrecision],
    device: Device,
    runtimes: Mapping[str, str],
    architecture: Architecture,
    workload: Workload,
) -> Iterator[str]:
    """What is known to go wrong, though not always. `runtimes`: stage -> runtime."""
    built = {stage for stage, runtime in runtimes.items() if runtime == TENSORRT}
    if any(layer.partition(".")[0] in built and p.inputs == "int8" for layer, p in precisions.items()):
        yield _SYMMETRIC
        if device.capability == 87:
            yield _QDQ
    stage = "prefix" if architecture.is_flow else "prefill"
    if device.tensorrt == "10.3" and stage in built and architecture.language_weights > LARGE_LANGUAGE:
        yield _LANGUAGE.format(stage=stage)
    floats = sum(p.computes(device.floats) == "float32" for p in precisions.values())
    if device.capability and floats:
        yield _DOUBLED.format(share=floats / len(precisions))
    if workload.decoding == "parallel" and not architecture.parallel:
        yield _PARALLEL.format(name=architecture.name, training=TRAINING)
    if workload.decoding == "speculative":
        yield _ASSUMED.format(share=workload.acceptance)


def _words(precision: LayerPrecision) -> str:
    return precision.weights + (f" with {precision.inputs} inputs" if precision.inputs else "")
