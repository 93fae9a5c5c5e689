"""Marker nodes -> standard ONNX: what each `nn.Linear` becomes in the file.

Only operators of the ONNX standard appear (opset 21), in the forms that every runtime knows how to fuse:

    float32, float16    MatMul (a Cast where weights are stored in half)
    int8, int4          DequantizeLinear -> MatMul, per channel or per block
    + static int8       QuantizeLinear -> DequantizeLinear on the input
    + dynamic int8      DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul (int8 per channel)

Layers that read the same tensor share its rounding, which is written once. (One product with its output split, in
place of three products, was measured to be no faster on the CPU.)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.engine.trace import MARKER_DOMAIN, OPSET, ExportError

# A constant operand at least this large in a product would be a layer the compressor never saw.
LARGEST_ANONYMOUS_CONSTANT = 1024


def lower(graph, layers: Mapping[str, CompressedLinear], norms: Mapping[str, np.ndarray], stage: str):
    """A traced model with every marker replaced, ready to be saved.

    Args:
        graph: `onnx.ModelProto` of `trace`; it is not changed.
        layers: every linear layer of the stage by name.
        norms: constant of `rescalable_norms` by name -> its value.

    Raises:
        ExportError: a norm or a layer is not in the graph, the graph holds one that is not in `layers`, or a large constant
            product is no `nn.Linear`.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    _check_complete(model, layers, stage)
    _fill(model, norms, stage)
    builder = _Builder(model)
    for node in list(model.graph.node):
        if node.domain == MARKER_DOMAIN:
            builder.linear(node, layers[_layer_name(node)])
        else:
            builder.nodes.append(_divide_by_root(node, builder))
    return builder.finish()


def _layer_name(node) -> str:
    return next(attribute.s.decode() for attribute in node.attribute if attribute.name == "layer")


def _check_complete(model, layers: Mapping[str, CompressedLinear], stage: str) -> None:
    markers = {_layer_name(node) for node in model.graph.node if node.domain == MARKER_DOMAIN}
    for name in layers:
        if name not in markers:
            raise ExportError(
                f"layer {name!r} of stage {stage!r} does not appear in the exported graph; its forward never calls it"
            )
    for name in markers - set(layers):
        raise ExportError(f"stage {stage!r} calls the linear layer {name!r}, for which nothing was planned")
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx", MARKER_DOMAIN)}
    if foreign:
        raise ExportError(f"stage {stage!r} needs operators outside the ONNX standard: {', '.join(sorted(foreign))}")
    sizes = {constant.name: int(np.prod(constant.dims)) for constant in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv", "Einsum"):
            for operand in node.input:
                if sizes.get(operand, 0) > LARGEST_ANONYMOUS_CONSTANT:
                    raise ExportError(
                        f"stage {stage!r} multiplies by the constant {operand!r} without an nn.Linear, so it would "
                        "never be compressed; write it as one"
                    )


def _fill(model, norms: Mapping[str, np.ndarray], stage: str) -> None:
    import onnx

    constants = {constant.name: constant for constant in model.graph.initializer}
    for name, value in norms.items():
        if name not in constants or tuple(constants[name].dims) != value.shape:
            raise ExportError(f"the norm {name!r} of stage {stage!r} did not survive the export")
        constants[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))


def _divide_by_root(node, builder: _Builder):
    """x * (1 / sqrt(v)) -> x / sqrt(v): the form in which runtimes recognize an RMS normalization."""
    import onnx

    if node.op_type == "Reciprocal":
        builder.reciprocals[node.output[0]] = node.input[0]
    if node.op_type == "Mul":
        for i, operand in enumerate(node.input):
            if operand in builder.reciprocals:
                inputs = [node.input[1 - i], builder.reciprocals[operand]]
                return onnx.helper.make_node("Div", inputs, list(node.output), node.name)
    return node


class _Builder:
    """Collects the nodes and constants of the lowered graph."""

    def __init__(self, model):
        self.model = model
        self.nodes: list = []
        self.constants: dict[str, object] = {}
        self.reciprocals: dict[str, str] = {}
        self.quantized_inputs: dict[tuple, tuple[str, ...]] = {}

    def linear(self, node, layer: CompressedLinear) -> None:
        """Emit the product that stands for marker `node`."""
        # a layer that is called twice keeps one set of constants
        name, x, y = _layer_name(node), node.input[0], node.output[0]
        call = name if f"{name}.weight" not in self.constants else f"{name}@{y}"
        product = y if layer.bias is None else f"{call}.product"
        dynamic = layer.activation is not None and layer.activation.kind == "dynamic"
        if dynamic and layer.weight.bits == 8 and layer.weight.group_size is None:
            self._multiply_integers(name, call, x, layer, product)
        else:
            left = self._activation(x, layer)
            self._node("MatMul", [left, self._weight(name, call, layer)], [product], call)
        if layer.bias is not None:
            self._node("Add", [product, self._constant(f"{name}.bias", layer.bias)], [y], f"{call}.add")

    def finish(self):
        """The model with new nodes, no unused constants, no trace of where it was made."""
        import onnx

        graph, model = self.model.graph, self.model
        outputs = {value.name for value in graph.output}
        while True:
            used = {operand for node in self.nodes for operand in node.input} | outputs
            kept = [node for node in self.nodes if any(output in used for output in node.output)]
            if len(kept) == len(self.nodes):
                break
            self.nodes = kept
        constants = {constant.name: constant for constant in graph.initializer} | self.constants
        clean = onnx.helper.make_graph(
            self.nodes,
            graph.name or "stage",
            list(graph.input),
            list(graph.output),
            [constants[name] for name in constants if name in used],
        )
        for node in clean.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for value in (*clean.input, *clean.output):
            del value.metadata_props[:]
        for constant in clean.initializer:
            del constant.metadata_props[:]
            constant.doc_string = ""
        fresh = onnx.helper.make_model(
            clean, opset_imports=[onnx.helper.make_opsetid("", OPSET)], producer_name="vla_edge"
        )
        fresh.ir_version = min(model.ir_version, 10)
        return fresh

    def _activation(self, x: str, layer: CompressedLinear) -> str:
        """The tensor to multiply with: `x`, or `x` seen through its 8-bit grid; made once for all its readers."""
        activation = layer.activation
        if activation is None:
            return x
        if (x, activation) not in self.quantized_inputs:
            if activation.kind == "static":
                tag = f"{x}.q{sum(key[0] == x for key in self.quantized_inputs)}"
                scale = self._constant(f"{tag}.scale", np.float32(activation.scale))
                zero = self._constant(f"{tag}.zero_point", np.uint8(activation.zero_point))
                self._node("QuantizeLinear", [x, scale, zero], [tag], f"{tag}.quantize")
                grid = (tag, scale, zero)
            else:
                grid = self._dynamic_grid(x)
            seen = f"{grid[0]}.dequantized"
            self._node("DequantizeLinear", list(grid), [seen], f"{grid[0]}.dequantize")
            self.quantized_inputs[x, activation] = (seen,)
        return self.quantized_inputs[x, activation][0]

    def _dynamic_grid(self, x: str) -> tuple[str, str, str]:
        key = (x, "dynamic grid")
        if key not in self.quantized_inputs:
            grid = (f"{x}.dq", f"{x}.dq.scale", f"{x}.dq.zero_point")
            self._node("DynamicQuantizeLinear", [x], list(grid), f"{x}.dq.quantize")
            self.quantized_inputs[key] = grid
        return self.quantized_inputs[key]

    def _multiply_integers(self, name: str, call: str, x: str, layer: CompressedLinear, product: str) -> None:
        grid, scale, zero = self._dynamic_grid(x)
        weight = self._constant(f"{name}.weight", layer.weight.values.T)
        channel = self._constant(f"{name}.scale", layer.weight.scales)
        none = self._constant(f"{name}.zero_point", np.int8(0))
        self._node("MatMulInteger", [grid, weight, zero, none], [f"{call}.sum"], call)
        self._node("Cast", [f"{call}.sum"], [f"{call}.float"], f"{call}.cast", to=1)
        self._node("Mul", [scale, channel], [f"{call}.step"], f"{call}.scales")
        self._node("Mul", [f"{call}.float", f"{call}.step"], [product], f"{call}.rescale")

    def _weight(self, name: str, call: str, layer: CompressedLinear) -> str:
        """Name of the (in, out) float32 matrix."""
        import onnx

        stored, seen = f"{name}.weight", f"{call}.weight.float"
        if not layer.quantized:
            self._constant(stored, layer.weight.T)
            if layer.precision == "float32":
                return stored
            self._node("Cast", [stored], [seen], f"{call}.weight.cast", to=1)
            return seen
        values, group = layer.weight.values.T, layer.weight.group_size
        operands = [stored, self._constant(f"{name}.scale", layer.weight.scales.T)]
        if layer.weight.bits == 8:
            self._constant(stored, values)
            if group is None:
                # zeros by default, but ONNX Runtime's rewrite of signed weights to unsigned ones needs them spelled out
                operands.append(self._constant(f"{name}.zero_point", np.zeros(values.shape[1], np.int8)))
        else:
            self.constants[stored] = onnx.helper.make_tensor(
                stored, onnx.TensorProto.INT4, values.shape, pack_int4(values).tobytes(), raw=True
            )
        attributes = {"axis": 1} if group is None else {"axis": 0, "block_size": group}
        self._node("DequantizeLinear", operands, [seen], f"{call}.weight.dequantize", **attributes)
        return seen

    def _node(self, op: str, inputs: list[str], outputs: list[str], name: str, **attributes) -> None:
        import onnx

        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, name, **attributes))

    def _constant(self, name: str, value) -> str:
        import onnx

        self.constants[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        return name


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Signed 4-bit integers, two in a byte, the first in the low half (ONNX's INT4 layout)."""
    flat = np.ascontiguousarray(values).ravel().astype(np.uint8) & 0x0F
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return flat[0::2] | (flat[1::2] << 4)
