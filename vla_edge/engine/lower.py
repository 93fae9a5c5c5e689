"""Marker nodes -> standard ONNX: what each `nn.Linear` becomes in the file.

Only operators of the ONNX standard appear (opset 21, or 23 with NVFP4), in the forms that runtimes know how to fuse:

    float32, float16    MatMul (a Cast where weights are stored in half); of convolutions see `engine.convolutions`
    int8, int4, fp8     DequantizeLinear -> MatMul, per channel or per block
    nvfp4               DequantizeLinear of its scales -> DequantizeLinear -> MatMul (opset 23)
    + static int8, fp8  QuantizeLinear -> DequantizeLinear on the input
    + dynamic int8      DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul (int8 per channel)
    + dynamic int4      the step of each group from its largest value -> QuantizeLinear -> DequantizeLinear
    low rank            MatMul -> MatMul, added to the product if there is one

Layers that read the same tensor share its rounding, which is written once. (One product with its output split, in
place of three products, was measured to be no faster on the CPU.) A large table of which rows are taken, of words, is stored
in bfloat16 where that loses nothing, as of every checkpoint in bfloat16, and its rows are cast to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from vla_edge.compress.quantize.formats import FP8, INT4
from vla_edge.compress.quantize.packing import pack_4_bits
from vla_edge.compress.quantize.weights import ActivationQuant, CompressedLinear, QuantizedWeight
from vla_edge.engine import convolutions
from vla_edge.engine.onnx_graph import needed
from vla_edge.engine.trace import CONVOLUTION, MARKER_DOMAIN, OPSET, ExportError

# A constant operand at least this large in a product would be a layer the compressor never saw.
LARGEST_ANONYMOUS_CONSTANT = 1024
LEAST_TABLE = 2**18  # values of a table worth storing in half
# The first that knows 4-bit floating point; every other file stays with the one that all runtimes know.
NVFP4_OPSET = 23


def lower(
    graph,
    layers: Mapping[str, CompressedLinear],
    parameters: Mapping[str, np.ndarray],
    stage: str,
    written: Callable[[object], None] = lambda constant: None,
):
    """A traced model with every marker replaced, ready to be saved.

    Args:
        graph: `onnx.ModelProto` of `trace`; it is not changed.
        layers: every linear layer of the stage by name.
        parameters: all others of the stage by name -> value.
        written: shown each constant (`onnx.TensorProto`) of the result as soon as it is there; it may move its data to
            another file, so that those of all layers are never in memory together.

    Raises:
        ExportError: a layer is not in the graph, the graph holds one that is not in `layers`, or a large
            constant product is no `nn.Linear`.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    _check_complete(model, layers, stage)
    read = {operand for node in model.graph.node for operand in node.input} | {value.name for value in model.graph.output}
    tables = _tables(model.graph)
    for constant in model.graph.initializer:
        _fill(constant, parameters, constant.name in tables)
        if constant.name in read:
            written(constant)
    builder = _Builder(model, written)
    halves = {constant.name for constant in model.graph.initializer if constant.data_type == onnx.TensorProto.BFLOAT16}
    for node in list(model.graph.node):
        if node.domain == MARKER_DOMAIN and node.op_type == CONVOLUTION:
            builder.convolution(node, layers[_layer_name(node)])
        elif node.domain == MARKER_DOMAIN:
            builder.linear(_layer_name(node), node.input[0], node.output[0], layers[_layer_name(node)])
        elif node.op_type == "Gather" and node.input[0] in halves:
            y, node.output[0] = node.output[0], f"{node.output[0]}.stored"
            builder.nodes.append(node)
            builder.node("Cast", [node.output[0]], [y], f"{y}.cast", to=1)
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
        if node.op_type in ("MatMul", "Gemm", "Conv", "Einsum") and not convolutions.is_depthwise(node):
            for operand in node.input:
                if sizes.get(operand, 0) > LARGEST_ANONYMOUS_CONSTANT:
                    raise ExportError(
                        f"stage {stage!r} multiplies by the constant {operand!r} without an nn.Linear, so it would "
                        "never be compressed; write it as one"
                    )


def _tables(graph) -> set[str]:
    """Large matrices that are only read a row at a time."""
    large = {constant.name for constant in graph.initializer if np.prod(constant.dims) >= LEAST_TABLE}
    otherwise = {
        operand for node in graph.node for place, operand in enumerate(node.input) if (node.op_type, place) != ("Gather", 0)
    }
    return large - otherwise - {value.name for value in graph.output}


def _fill(constant, parameters: Mapping[str, np.ndarray], table: bool) -> None:
    """The value of a parameter, which `trace` left out; a table's in bfloat16 if that is all there is to it."""
    from onnx import TensorProto

    if constant.data_location == TensorProto.EXTERNAL and constant.name in parameters:
        constant.ClearField("external_data")
        constant.ClearField("data_location")
        value = np.ascontiguousarray(parameters[constant.name])
        if table and value.dtype == np.float32:
            halves = value.view("<u2").reshape(*value.shape, 2)  # of each number, the lower one first
            if not halves[..., 0].any():
                constant.data_type, value = TensorProto.BFLOAT16, halves[..., 1]
        constant.raw_data = value.tobytes()


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

    def __init__(self, model, written: Callable[[object], None]):
        self.model, self.written = model, written
        self.nodes: list = []
        self.constants: dict[str, object] = {}
        self.reciprocals: dict[str, str] = {}
        self.derived: dict[tuple, tuple[str, ...]] = {}
        self.scaled_inputs: dict[tuple[str, bytes], str] = {}
        self.called: set[str] = set()
        self.opset = OPSET

    def convolution(self, node, layer: CompressedLinear) -> None:
        """Emit what stands for a convolution's marker."""
        name, x, y, shape = _layer_name(node), node.input[0], node.output[0], convolutions.Shape.of(node)
        if convolutions.is_direct(layer):
            convolutions.convolve(self, name, self._call(name, y), x, layer, shape, y)
        else:
            self.linear(name, convolutions.patches(self, f"{y}.patches", x, shape), y, layer)

    def linear(self, name: str, x: str, y: str, layer: CompressedLinear) -> None:
        """Emit the product of `x` and a layer."""
        call = self._call(name, y)
        parts = []
        if layer.weight is not None:
            product, scaled = f"{call}.product", self._scaled(x, layer)
            if _is_integer_product(layer):
                self._multiply_integers(name, call, scaled, layer, product)
            else:
                left = self._activation(scaled, layer)
                self.node("MatMul", [left, self._weight(name, call, layer)], [product], call)
            parts.append(product)
        if layer.low_rank is not None:
            thin = self.float_matrix(f"{name}.down", f"{call}.down", layer.low_rank.down.T)
            wide = self.float_matrix(f"{name}.up", f"{call}.up", layer.low_rank.up.T)
            self.node("MatMul", [x, thin], [f"{call}.thin"], f"{call}.low_rank.down")
            self.node("MatMul", [f"{call}.thin", wide], [f"{call}.branch"], f"{call}.low_rank.up")
            parts.append(f"{call}.branch")
        if layer.bias is not None:
            parts.append(self.constant(f"{name}.bias", layer.bias))
        if len(parts) == 1:
            self.nodes[-1].output[0] = y
        else:
            for number, part in enumerate(parts[1:], 1):
                total = y if number == len(parts) - 1 else f"{call}.sum{number}"
                self.node("Add", [parts[0], part], [total], f"{call}.add{number}")
                parts[0] = total

    def _call(self, name: str, y: str) -> str:
        """Of a use of a layer; one that is called twice keeps one set of constants."""
        call = name if name not in self.called else f"{name}@{y}"
        self.called.add(name)
        return call

    def transposed(self, x: str, order: list[int]) -> str:
        """Name of `x` with its axes in that order; made once for all its readers."""
        key = (x, tuple(order))
        if key not in self.derived:
            self.node("Transpose", [x], [f"{x}.transposed"], f"{x}.transpose", perm=order)
            self.derived[key] = (f"{x}.transposed",)
        return self.derived[key][0]

    def finish(self):
        """The model with new nodes, no unused constants, no trace of where it was made."""
        import onnx

        graph, model = self.model.graph, self.model
        self.nodes, used = needed(self.nodes, (value.name for value in graph.output))
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
            clean, opset_imports=[onnx.helper.make_opsetid("", self.opset)], producer_name="vla_edge"
        )
        fresh.ir_version = min(model.ir_version, 10) if self.opset == OPSET else 11
        return fresh

    def _scaled(self, x: str, layer: CompressedLinear) -> str:
        """`x` times what its readers want it multiplied by; made once for all that want the same."""
        if layer.input_scale is None:
            return x
        key = (x, layer.input_scale.tobytes())
        if key not in self.scaled_inputs:
            name = f"{x}.s{sum(known[0] == x for known in self.scaled_inputs)}"
            self.node("Mul", [x, self.constant(f"{name}.scale", layer.input_scale)], [name], f"{name}.rescale")
            self.scaled_inputs[key] = name
        return self.scaled_inputs[key]

    def _activation(self, x: str, layer: CompressedLinear) -> str:
        """The tensor to multiply with: `x`, or `x` seen through its 8-bit grid; made once for all its readers."""
        activation = layer.activation
        if activation is None:
            return x
        if (x, activation) not in self.derived:
            tag = f"{x}.q{sum(key[0] == x for key in self.derived)}"
            attributes = {}
            if activation.kind == "static":
                scale = self.constant(f"{tag}.scale", np.float32(activation.scale))
                zero = self.constant(f"{tag}.zero_point", _zero_point(activation))
                self.node("QuantizeLinear", [x, scale, zero], [tag], f"{tag}.quantize")
                grid = (tag, scale, zero)
            elif activation.format == "int4":
                grid, attributes = self._grouped_grid(x, tag, activation.group_size, layer.shape[1])
            else:
                grid = self._dynamic_grid(x)
            seen = f"{grid[0]}.dequantized"
            self.node("DequantizeLinear", list(grid), [seen], f"{grid[0]}.dequantize", **attributes)
            self.derived[x, activation] = (seen,)
        return self.derived[x, activation][0]

    def _dynamic_grid(self, x: str) -> tuple[str, str, str]:
        key = (x, "dynamic grid")
        if key not in self.derived:
            grid = (f"{x}.dq", f"{x}.dq.scale", f"{x}.dq.zero_point")
            self.node("DynamicQuantizeLinear", [x], list(grid), f"{x}.dq.quantize")
            self.derived[key] = grid
        return self.derived[key]

    def _grouped_grid(self, x: str, tag: str, group: int, width: int) -> tuple[tuple[str, str], dict]:
        """Signed 4 bits, with the step of each group of channels found at run time."""
        import onnx

        last = self.constant(f"{tag}.groups", np.array([width // group, group], np.int64))
        self.node("Shape", [x], [f"{tag}.leading"], f"{tag}.shape", start=0, end=-1)
        self.node("Concat", [f"{tag}.leading", last], [f"{tag}.split"], f"{tag}.concat", axis=0)
        self.node("Reshape", [x, f"{tag}.split"], [f"{tag}.grouped"], f"{tag}.group")
        self.node("Abs", [f"{tag}.grouped"], [f"{tag}.magnitude"], f"{tag}.abs")
        axes = self.constant(f"{tag}.axes", np.array([-1], np.int64))
        self.node("ReduceMax", [f"{tag}.magnitude", axes], [f"{tag}.largest"], f"{tag}.max", keepdims=0)
        share = self.constant(f"{tag}.share", np.float32(1 / INT4.largest))
        least = self.constant(f"{tag}.least", np.float32(np.finfo(np.float32).tiny))
        self.node("Mul", [f"{tag}.largest", share], [f"{tag}.wanted"], f"{tag}.divide")
        self.node("Max", [f"{tag}.wanted", least], [f"{tag}.scale"], f"{tag}.clamp")
        attributes = {"axis": -1, "block_size": group}
        self.node(
            "QuantizeLinear", [x, f"{tag}.scale"], [tag], f"{tag}.quantize",
            output_dtype=onnx.TensorProto.INT4, **attributes,
        )  # fmt: skip
        return (tag, f"{tag}.scale"), attributes

    def _multiply_integers(self, name: str, call: str, x: str, layer: CompressedLinear, product: str) -> None:
        grid, scale, zero = self._dynamic_grid(x)
        weight = self.constant(f"{name}.weight", layer.weight.values.T)
        channel = self.constant(f"{name}.scale", layer.weight.scales)
        none = self.constant(f"{name}.zero_point", np.int8(0))
        self.node("MatMulInteger", [grid, weight, zero, none], [f"{call}.sum"], call)
        self.node("Cast", [f"{call}.sum"], [f"{call}.float"], f"{call}.cast", to=1)
        self.node("Mul", [scale, channel], [f"{call}.step"], f"{call}.scales")
        self.node("Mul", [f"{call}.float", f"{call}.step"], [product], f"{call}.rescale")

    def _weight(self, name: str, call: str, layer: CompressedLinear) -> str:
        """Name of the (in, out) float32 matrix."""
        import onnx

        if not layer.quantized:
            return self.float_matrix(f"{name}.weight", f"{call}.weight", layer.weight.T)
        weight, stored, seen = layer.weight, f"{name}.weight", f"{call}.weight.float"
        values = weight.values.T
        if weight.grid.bits == 8:
            self.constant(stored, values)
        else:
            integer = weight.grid.is_integer
            kind = onnx.TensorProto.INT4 if integer else onnx.TensorProto.FLOAT4E2M1
            codes = values if integer else values.view(np.uint8)
            packed = pack_4_bits(codes).tobytes()
            self._keep(onnx.helper.make_tensor(stored, kind, values.shape, packed, raw=True))
        operands = [stored, self._scales(name, call, weight)]
        if weight.format == "int8" and weight.group_size is None:
            # zeros by default, but ONNX Runtime's rewrite of signed weights to unsigned ones needs them spelled out
            operands.append(self.constant(f"{name}.zero_point", np.zeros(values.shape[1], np.int8)))
        attributes = {"axis": 1} if weight.group_size is None else {"axis": 0, "block_size": weight.group_size}
        self.node("DequantizeLinear", operands, [seen], f"{call}.weight.dequantize", **attributes)
        return seen

    def _scales(self, name: str, call: str, weight: QuantizedWeight) -> str:
        """Name of the float32 scales; what stores them in fewer bits is part of the file."""
        stored = self.constant(f"{name}.scale", weight.scales.T)
        if weight.scales.dtype == np.float32:
            return stored
        seen = f"{call}.scale.float"
        if weight.format == "nvfp4":
            self.opset = NVFP4_OPSET
            whole = self.constant(f"{name}.tensor_scale", np.float32(weight.tensor_scale))
            self.node("DequantizeLinear", [stored, whole], [seen], f"{call}.scale.dequantize")
        else:
            self.node("Cast", [stored], [seen], f"{call}.scale.cast", to=1)
        return seen

    def float_matrix(self, stored: str, call: str, matrix: np.ndarray) -> str:
        """Name of `matrix` in float32, stored in the precision it has."""
        self.constant(stored, matrix)
        if matrix.dtype == np.float32:
            return stored
        self.node("Cast", [stored], [f"{call}.float"], f"{call}.cast", to=1)
        return f"{call}.float"

    def node(self, op: str, inputs: list[str], outputs: list[str], name: str, **attributes) -> None:
        import onnx

        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, name, **attributes))

    def constant(self, name: str, value) -> str:
        import onnx

        self._keep(onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name))
        return name

    def _keep(self, constant) -> None:
        self.constants[constant.name] = constant
        self.written(constant)


def _is_integer_product(layer: CompressedLinear) -> bool:
    """Whether weights and inputs of 8 bits can be multiplied as the integers they are."""
    dynamic = layer.activation is not None and layer.activation.kind == "dynamic" and layer.activation.format == "int8"
    return dynamic and layer.weight.format == "int8" and layer.weight.group_size is None


def _zero_point(activation: ActivationQuant) -> np.ndarray:
    """Which also tells the type that inputs are rounded to."""
    if activation.format == "fp8":
        return np.zeros((), FP8.dtype)
    return np.array(activation.zero_point, np.uint8)
