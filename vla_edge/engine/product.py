"""A stage that is one product, in any precision, written without PyTorch: what runtimes are tried and measured with."""

from __future__ import annotations

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
    return StageInterface(
        "product", (TensorSpec("x", (1, rows, inputs)),), (TensorSpec("y", (1, rows, outputs)),)
    )


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
    import onnx

    from vla_edge.engine.lower import lower
    from vla_edge.engine.trace import MARKER, MARKER_DOMAIN, OPSET

    outputs, inputs = layer.shape
    stage = product_interface(rows, inputs, outputs)
    marker = onnx.helper.make_node(MARKER, ["x"], ["y"], domain=MARKER_DOMAIN, layer="layer")
    x, y = (
        onnx.helper.make_tensor_value_info(spec.name, onnx.TensorProto.FLOAT, spec.shape)
        for spec in (*stage.inputs, *stage.outputs)
    )
    graph = onnx.helper.make_model(
        onnx.helper.make_graph([marker], "product", [x], [y]),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MARKER_DOMAIN, 1)],
    )
    return lower(graph, {"layer": layer}, {}, "product").SerializeToString(deterministic=True)
