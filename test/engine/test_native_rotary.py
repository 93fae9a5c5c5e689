"""Rotary embeddings of a stage file: found as exporters write them, and the same numbers by one operator."""

import numpy as np
import onnx
import pytest
from native_kernels import KERNELS

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.native.rewrite import use_kernels
from vla_edge.engine.native.rotary import OPERATOR
from vla_edge.engine.trace import OPSET
from vla_edge.policy.stages import TensorSpec

pytestmark = pytest.mark.skipif(KERNELS is None, reason="the kernels are not compiled here")
OWN = {"own_kernels": True, "threads": 2}
ROWS, DEPTH = 7, 10


def rotary_file(path, heads, rows_first, swapped=False):
    """x turned by cosines and sines of its rows, as PyTorch's exporter writes it; returns the interface."""
    node = onnx.helper.make_node
    shape, half = (1, heads, ROWS, DEPTH), (1, ROWS, DEPTH // 2)
    given = (1, ROWS, heads, DEPTH) if rows_first else shape
    nodes = [node("Transpose", ["x"], ["t"], perm=[0, 2, 1, 3])] if rows_first else [node("Identity", ["x"], ["t"])]
    a, b = ("b", "a") if swapped else ("a", "b")
    nodes += [
        node("Unsqueeze", ["cos", "one"], ["c"]), node("Unsqueeze", ["sin", "one"], ["s"]),
        node("Split", ["t"], [a, b], axis=3, num_outputs=2),
        node("Mul", ["a", "c"], ["ac"]), node("Mul", ["b", "s"], ["bs"]), node("Sub", ["ac", "bs"], ["left"]),
        node("Mul", ["b", "c"], ["bc"]), node("Mul", ["a", "s"], ["as"]), node("Add", ["bc", "as"], ["right"]),
        node("Concat", ["left", "right"], ["y"], axis=-1),
    ]  # fmt: skip
    inputs = {"x": given, "cos": half, "sin": half}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    one = onnx.numpy_helper.from_array(np.array([1]), "one")
    graph = onnx.helper.make_graph(nodes, "rotary", values, [y], [one])
    path.write_bytes(onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10,
    ).SerializeToString())  # fmt: skip
    specs = tuple(TensorSpec(name, shape) for name, shape in inputs.items())
    return StageInterface("rotary", specs, (TensorSpec("y", shape),))


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 200])  # the last of them on several threads
def test_it_is_found_and_gives_the_same(heads, rows_first, tmp_path):
    path = tmp_path / "rotary.onnx"
    stage = rotary_file(path, heads, rows_first)
    rng = np.random.default_rng(0)
    inputs = {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in stage.inputs}
    expected = get_backend("onnxruntime").load(path, stage).run(inputs)["y"]
    use_kernels(path)
    operators = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert operators.count(OPERATOR) == 1 and not {"Split", "Mul", "Concat", "Transpose"} & set(operators)
    found = get_backend("onnxruntime").load(path, stage, OWN).run(inputs)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_what_turns_the_other_way_stays(tmp_path):
    path = tmp_path / "rotary.onnx"
    rotary_file(path, 3, False, swapped=True)
    use_kernels(path)
    assert OPERATOR not in [node.op_type for node in onnx.load(str(path)).graph.node]


def test_angles_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "rotary.onnx"
    stage = rotary_file(path, 3, False)
    use_kernels(path)
    model = onnx.load(str(path))
    rotary = next(node for node in model.graph.node if node.op_type == OPERATOR)
    rotary.input[1] = "x"
    path.write_bytes(model.SerializeToString())
    inputs = {spec.name: spec.zeros() for spec in stage.inputs}
    with pytest.raises(BackendError, match="do not fit together"):
        get_backend("onnxruntime").load(path, stage, OWN).run(inputs)
