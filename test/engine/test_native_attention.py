"""Our attention in whole numbers: in every way that this processor runs, and in the files that use it."""

import ctypes

import numpy as np
import onnx
import pytest
import torch
from native_kernels import KERNELS, WAYS

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.native.attention import OPERATOR, Attentions
from vla_edge.engine.native.rewrite import use_kernels
from vla_edge.engine.trace import OPSET
from vla_edge.policy.stages import TensorSpec

pytestmark = pytest.mark.skipif(KERNELS is None, reason="the kernels are not compiled here")
OWN = {"own_kernels": True, "threads": 1}


class Attention(ctypes.Structure):
    """As native/attention.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "y")),
        *((name, ctypes.c_size_t) for name in ("heads", "rows", "tokens", "depth", "width", "mask_rows", "rows_first")),
        ("scale", ctypes.c_float),
        ("before", ctypes.c_size_t), ("k_before", ctypes.c_void_p), ("v_before", ctypes.c_void_p),
    ]  # fmt: skip


def attend(way, q, k, v, scale, mask=None, rows_first=0, before=0):
    """y, (heads, rows, width), of arrays with their heads first; keys and values of `before` tokens lie elsewhere."""
    (heads, rows, depth), (_, tokens, width) = q.shape, v.shape
    cache = [np.ascontiguousarray(array[:, :before]) for array in (k, v)]
    given = [
        np.ascontiguousarray(array.transpose(1, 0, 2) if rows_first >> bit & 1 else array)
        for bit, array in enumerate((q, k[:, before:], v[:, before:]))
    ]
    y = np.full((rows, heads, width) if rows_first & 8 else (heads, rows, width), 7.0, np.float32)
    places = [array.ctypes.data for array in given]
    told = Attention(
        *places, None if mask is None else mask.ctypes.data, y.ctypes.data, heads, rows, tokens, depth, width,
        1 if mask is None else len(mask), rows_first, scale, before, *(array.ctypes.data for array in cache),
    )  # fmt: skip
    assert KERNELS.vla_edge_attention(ctypes.byref(told), way.encode()) == 0
    return y.transpose(1, 0, 2) if rows_first & 8 else y


def expected(q, k, v, scale, mask=None):
    scores = scale * q.astype(np.float64) @ k.astype(np.float64).transpose(0, 2, 1)
    if mask is not None:
        scores = scores + np.tile(mask.astype(np.float64), (q.shape[1] // len(mask), 1))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def case(heads, rows, tokens, depth, width, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (heads, rows, depth), (heads, tokens, depth), (heads, tokens, width)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
@pytest.mark.parametrize(
    ("heads", "rows", "tokens", "depth", "width"),
    [(1, 1, 1, 2, 1), (2, 7, 33, 64, 64), (3, 96, 85, 32, 32), (1, 13, 300, 128, 100), (2, 9, 1040, 72, 80)],
)
def test_is_the_attention_of_float64(way, sharpness, heads, rows, tokens, depth, width):
    q, k, v = case(heads, rows, tokens, depth, width)
    scale = sharpness * depth**-0.5
    assert relative(attend(way, q, k, v, scale), expected(q, k, v, scale)) < 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows_first", [0, 1, 2, 4, 8, 15])
def test_reads_and_writes_heads_or_rows_first(way, rows_first):
    q, k, v = case(3, 20, 50, 32, 48)
    found = attend(way, q, k, v, 0.2, rows_first=rows_first)
    np.testing.assert_array_equal(found, attend(way, q, k, v, 0.2))
    assert relative(found, expected(q, k, v, 0.2)) < 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows_first", [0, 2, 4])
@pytest.mark.parametrize("before", [1, 31, 50])
def test_tokens_that_lie_elsewhere_are_as_if_they_did_not(way, rows_first, before):
    q, k, v = case(3, 20, 50, 32, 48)
    found = attend(way, q, k, v, 0.2, rows_first=rows_first, before=before)
    np.testing.assert_array_equal(found, attend(way, q, k, v, 0.2))


@pytest.mark.parametrize("way", WAYS)
def test_what_a_mask_hides_is_not_seen(way):
    q, k, v = case(2, 24, 40, 32, 32)
    mask = np.where(np.random.default_rng(1).random((8, 40)) < 0.5, np.float32(-1e9), np.float32(0))
    mask[:, 0] = 0
    found = attend(way, q, k, v, 0.2, mask)
    assert relative(found, expected(q, k, v, 0.2, mask)) < 1e-3
    hidden = np.full((8, 40), -np.inf, np.float32)
    hidden[:, 5] = 0
    assert relative(attend(way, q, k, v, 0.2, hidden), np.tile(v[:, 5:6], (1, 24, 1))) < 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 16, 4096, 8192])
def test_extremes_do_not_overflow(way, tokens):
    """All products of the largest numbers and of one sign; all tokens alike, or one alone."""
    for depth in (2, 32, 64, 128, 256):
        q, k = np.full((1, 1, depth), 3.0, np.float32), np.full((1, tokens, depth), -2.0, np.float32)
        v = np.full((1, tokens, 16), -5.0, np.float32)
        for sign in (1, -1):
            np.testing.assert_allclose(attend(way, q, sign * k, v, 1.0), np.full((1, 1, 16), -5.0), rtol=1e-3)
        k[0, -1] = 9.0
        np.testing.assert_allclose(attend(way, q, k, v, 1.0), np.full((1, 1, 16), -5.0), rtol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_is_seen(way):
    for value in (np.nan, np.inf):
        q, k, v = case(2, 9, 30, 32, 32)
        q[0, 3, 5] = value
        found = attend(way, q, k, v, 0.2)
        assert not np.isfinite(found[0, 3]).any() and np.isfinite(np.delete(found[0], 3, 0)).all()
        k[1, 2, 0] = value
        assert not np.isfinite(attend(way, q, k, v, 0.2)[1]).any()
        q, k, v = case(2, 9, 30, 32, 32)
        v[0, 2, 7] = value
        found = attend(way, q, k, v, 0.2)
        assert not np.isfinite(found[0, :, 7]).any() and np.isfinite(np.delete(found[0], 7, 1)).all()


class Module(torch.nn.Module):
    """Attention as policies here write it: groups of heads that share keys, a mask, keys and values of earlier tokens in a
    cache of two layers."""

    def __init__(self, groups: int, masked: bool, cached: bool):
        super().__init__()
        self.groups, self.masked, self.cached = groups, masked, cached

    def forward(self, q, k, v, mask, keys, values):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads first
        if self.cached:
            k, v = torch.cat((keys[1], k), -2), torch.cat((values[1], v), -2)
        batch, heads, rows, depth = q.shape
        if self.groups > 1:
            q = q.reshape(batch, heads // self.groups, self.groups * rows, depth)
        scores = q @ k.transpose(-1, -2) * depth**-0.5
        scores = scores.reshape(batch, heads, rows, -1) if self.groups > 1 else scores
        weights = torch.softmax(scores + mask if self.masked else scores, -1)
        if self.groups > 1:
            weights = weights.reshape(batch, heads // self.groups, self.groups * rows, -1)
        y = weights @ v
        y = y.reshape(batch, heads, rows, -1) if self.groups > 1 else y
        return y.transpose(1, 2).reshape(batch, rows, -1)


def see_in_8_bits(path, name):
    """Have an input of a stage file rounded, as a recipe has it."""
    model = onnx.load(str(path))
    grid = [f"{name}.codes", f"{name}.step", f"{name}.zero"]
    for node in model.graph.node:
        node.input[:] = [f"{name}.seen" if operand == name else operand for operand in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("DynamicQuantizeLinear", [name], grid))
    model.graph.node.insert(1, onnx.helper.make_node("DequantizeLinear", grid, [f"{name}.seen"]))
    path.write_bytes(model.SerializeToString())


def written(tmp_path, groups=1, masked=False, rows=24, before=0):
    """A stage file, its interface and inputs."""
    rng = np.random.default_rng(0)
    own, stack = (1, 40 - before, 6 // groups, 32), (2, 1, 6 // groups, before, 32)
    shapes = {"q": (1, rows, 6, 32), "k": own, "v": own, "mask": (1, 1, rows, 40), "keys": stack, "values": stack}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["mask"] = np.where(inputs["mask"] > 0.5, np.float32(-1e9), np.float32(0))
    path = tmp_path / "given.onnx"
    torch.onnx.export(
        Module(groups, masked, before > 0), tuple(torch.from_numpy(array) for array in inputs.values()), str(path), dynamo=True,
        opset_version=OPSET, input_names=list(inputs), output_names=["y"], external_data=False, verbose=False,
    )  # fmt: skip
    given = tuple(TensorSpec(name, shape) for name, shape in shapes.items())
    return path, StageInterface("attention", given, (TensorSpec("y", (1, rows, 192)),)), inputs


@pytest.mark.parametrize("before", [0, 15])
@pytest.mark.parametrize(("groups", "masked"), [(1, False), (1, True), (3, False), (3, True)])
def test_attention_of_a_file_is_found_and_runs(tmp_path, groups, masked, before):
    path, stage, inputs = written(tmp_path, groups, masked, before=before)
    runtime = get_backend("onnxruntime")
    assert not any(way.get("own_kernels") for way in runtime.candidates(path))  # of full precision it stays
    see_in_8_bits(path, "v")
    assert any(way.get("own_kernels") for way in runtime.candidates(path))
    exact = runtime.load(path, stage).run(inputs)["y"]
    place = tmp_path / "built"
    place.mkdir()
    built = runtime.build(path, place, stage, OWN)
    operators = [node.op_type for node in onnx.load(str(place / built.file)).graph.node]
    assert operators.count(OPERATOR) == 1 and not {"Softmax", "MatMul", "Concat", "Gather"} & set(operators)
    if groups == 1:  # heads and rows change places in the kernel alone
        assert "Transpose" not in operators
    found = runtime.load(place / built.file, stage, built.options).run(inputs)["y"]
    assert 0 < relative(found, exact) < 1e-3


def test_keys_of_one_layer_and_values_of_another_are_joined_by_the_runtime(tmp_path):
    path, stage, inputs = written(tmp_path, before=15)
    model = onnx.load(str(path))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "first"))
    next(node for node in model.graph.node if node.op_type == "Gather" and node.input[0] == "values").input[1] = "first"
    path.write_bytes(model.SerializeToString())
    exact = get_backend("onnxruntime").load(path, stage).run(inputs)["y"]
    use_kernels(path)
    (node,) = (node for node in onnx.load(str(path)).graph.node if node.op_type == OPERATOR)
    assert len(node.input) == 3
    assert 0 < relative(get_backend("onnxruntime").load(path, stage, OWN).run(inputs)["y"], exact) < 1e-3


def test_few_rows_and_other_sums_stay_the_runtimes(tmp_path):
    path, _, _ = written(tmp_path, rows=4)
    assert not Attentions(onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph).found
    model = onnx.shape_inference.infer_shapes(onnx.load(str(written(tmp_path, masked=True)[0])))
    assert len(Attentions(model.graph).found) == 1
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    seen = onnx.helper.make_tensor_value_info(softmax.output[0], onnx.TensorProto.FLOAT, (1, 6, 24, 40))
    model.graph.output.append(seen)  # somebody else reads the weights
    assert not Attentions(model.graph).found


@pytest.mark.parametrize(
    ("place", "other", "told"), [(2, 0, "do not fit together"), (4, 0, "do not fit"), (5, 0, "earlier tokens")]
)
def test_a_file_that_lies_about_its_shapes_is_refused(tmp_path, place, other, told):
    path, stage, inputs = written(tmp_path, masked=True, before=15)
    use_kernels(path)
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == OPERATOR)
    node.input[place] = node.input[other]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match=told):
        get_backend("onnxruntime").load(path, stage, OWN).run(inputs)


def test_a_layer_that_the_cache_has_not_is_refused(tmp_path):
    path, stage, inputs = written(tmp_path, masked=True, before=15)
    use_kernels(path)
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == OPERATOR)
    next(attribute for attribute in node.attribute if attribute.name == "layer").i = 2
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match="earlier tokens"):
        get_backend("onnxruntime").load(path, stage, OWN).run(inputs)
