"""A stage that is one product, in any precision, written without PyTorch: what runtimes are tried and measured with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_edge.compress.quantize.formats import number_format
from vla_edge.compress.quantize.rtn import round_to_nearest
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear
from vla_edge.engine.backends import StageInterface
from vla_edge.policy.stages import TensorSpec

# of files: weights, and inputs where they are rounded too
PRECISIONS = (
    "float32", "float16", "int8 weights", "int8", "int8 dynamic", "int4 weights", "fp8 weights", "nvfp4 weights",
)  # fmt: skip
# inputs are taken to lie between -1 and 1
_STEP, _ZERO = 2 / 255, 128


def product_interface(rows: int, inputs: int, outputs: int) -> StageInterface:
    """x (1, rows, inputs) -> y (1, rows, outputs)."""
    return StageInterface("product", (TensorSpec("x", (1, rows, inputs)),), (TensorSpec("y", (1, rows, outputs)),))


def in_precision(weight: np.ndarray, precision: str, group: int) -> CompressedLinear:
    """(outputs, inputs) float32 as one of `PRECISIONS`; `group` inputs share a scale in 4 bits (16 in NVFP4)."""
    name, _, inputs = precision.partition(" ")
    if name.startswith("float"):
        return CompressedLinear(weight.astype(name), None)
    groups = {"int4": group, "nvfp4": 16}
    rounded = round_to_nearest(weight, number_format(name), groups.get(name))
    seen = {
        "": ActivationQuant("static", scale=_STEP, zero_point=_ZERO), "dynamic": ActivationQuant("dynamic"),
        "weights": None,
    }  # fmt: skip
    return CompressedLinear(rounded, None, seen[inputs])


def product_file(layer: CompressedLinear, rows: int) -> bytes:
    """The ONNX of x @ layer.T."""
    return chain_file([layer], rows)


def chain_file(layers: Sequence[CompressedLinear], rows: int) -> bytes:
    """The ONNX of one product after the other; each has to take what the one before gives."""
    import onnx

    from vla_edge.engine.lower import lower
    from vla_edge.engine.trace import MARKER, MARKER_DOMAIN, OPSET

    names = ["x", *(f"h{index}" for index in range(1, len(layers))), "y"]
    markers = [
        onnx.helper.make_node(MARKER, [names[i]], [names[i + 1]], domain=MARKER_DOMAIN, layer=f"layer{i}")
        for i in range(len(layers))
    ]
    stage = product_interface(rows, layers[0].shape[1], layers[-1].shape[0])
    x, y = (
        onnx.helper.make_tensor_value_info(spec.name, onnx.TensorProto.FLOAT, spec.shape)
        for spec in (*stage.inputs, *stage.outputs)
    )
    graph = onnx.helper.make_model(
        onnx.helper.make_graph(markers, "product", [x], [y]),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MARKER_DOMAIN, 1)],
    )
    named = {f"layer{i}": layer for i, layer in enumerate(layers)}
    return lower(graph, named, {}, "product").SerializeToString(deterministic=True)
