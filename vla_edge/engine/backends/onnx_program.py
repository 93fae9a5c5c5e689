"""A stage file as its nodes in order, for libraries that read no ONNX: each has a table of operators.

What depends on no input, such as dequantized weights, is computed once, when the file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vla_edge.engine.backends import BackendError, StageInterface, check_tensors, one_line
from vla_edge.engine.onnx_graph import shape_of

# operands (None for one left out) and attributes -> the result, or a tuple of them
Operator = Callable[[Sequence, Mapping], object]


class Program:
    """Nodes that a library carries out one by one.

    Args:
        model: an `onnx.ModelProto` with its constants.
        operators: by their names in ONNX. They see constants as numpy arrays, all else as the library's own.
        finish: makes a result the library's own, where it was computed of constants alone.
        reader: the library, for messages.

    Attributes:
        inputs: name -> shape, in order. outputs: names, in order.

    Raises:
        BackendError: the file has an operator that is not in the table.
    """

    def __init__(self, model, operators: Mapping[str, Operator], finish: Callable, reader: str):
        import onnx

        graph = model.graph
        self._operators, self._finish = operators, finish
        self._known: dict = {"": None, **{constant.name: _array(constant) for constant in graph.initializer}}
        self.inputs = {value.name: shape_of(value) for value in graph.input}
        self.outputs = [value.name for value in graph.output]
        self._nodes = []
        for node in graph.node:
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            if node.op_type not in operators or node.domain not in ("", "ai.onnx"):
                raise BackendError(f"{reader}'s reader of stage files does not know the operator {node.op_type}")
            step = (node.op_type, list(node.input), list(node.output), attributes)
            if all(name in self._known for name in node.input):
                self._known.update(self._carry_out(step, self._known))
            else:
                self._nodes.append(step)

    def __call__(self, inputs: Mapping, wanted: Sequence[str]) -> tuple:
        """The outputs of those names."""
        values = {**self._known, **inputs}
        for step in self._nodes:
            values.update(self._carry_out(step, values))
        return tuple(self._finish(values[name]) for name in wanted)

    def _carry_out(self, step, values: Mapping) -> dict:
        kind, operands, results, attributes = step
        found = self._operators[kind]([values[name] for name in operands], attributes)
        return dict(zip(results, found if isinstance(found, tuple) else (found,)))


def read_program(
    path: str | Path, stage: StageInterface, operators: Mapping[str, Operator], finish: Callable, reader: str
) -> Program:
    """The file of `stage` as a program; `operators`, `finish` and `reader` as of `Program`.

    Raises:
        BackendError: the file cannot be read, has other tensors, or an operator that is not known.
    """
    import onnx

    try:
        program = Program(onnx.load(str(path)), operators, finish, reader)
    except BackendError:
        raise
    except Exception as error:  # onnx and protobuf raise many types
        raise BackendError(f"{reader} cannot read stage file {path}: {one_line(error)}") from error
    check_tensors(stage, program.inputs, program.outputs)
    return program


def ints(value) -> list[int]:
    """A constant of integers, as a list."""
    return [int(number) for number in np.asarray(value).ravel()]


def _array(constant) -> np.ndarray:
    """A constant; types that numpy lacks become float32, or int8 for packed integers."""
    import onnx

    array = onnx.numpy_helper.to_array(constant)
    if array.dtype.kind in "fiub":
        return array
    return array.astype(np.int8 if constant.data_type == onnx.TensorProto.INT4 else np.float32)
