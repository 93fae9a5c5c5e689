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
    ]


def attend(way, q, k, v, scale, mask=None, rows_first=0):
    """y, (heads, rows, width), of arrays with their heads first."""
    (heads, rows, depth), (_, tokens, width) = q.shape, v.shape
    given = [
        np.ascontiguousarray(array.transpose(1, 0, 2) if rows_first >> bit & 1 else array)
        for bit, array in enumerate((q, k, v))
    ]
    y = np.full((rows, heads, width) if rows_first & 8 else (heads, rows, width), 7.0, np.float32)
    places = [array.ctypes.data for array in given]
    told = Attention(
        *places, None if mask is None else mask.ctypes.data, y.ctypes.data, heads, rows, tokens, depth, width,
        1 if mask is None else len(mask), rows_first, scale,
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
    """Attention as policies here write it: groups of heads that share keys, a mask, keys that are stored elsewhere."""

    def __init__(self, groups: int, masked: bool):
        super().__init__()
        self.groups, self.masked = groups, masked

    def forward(self, q, k, v, mask):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads first
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


def written(tmp_path, groups=1, masked=False, rows=24):
    """A stage file, its interface and inputs."""
    rng = np.random.default_rng(0)
    cache = 1, 40, 6 // groups, 32
    shapes = {"q": (1, rows, 6, 32), "k": cache, "v": cache, "mask": (1, 1, rows, 40)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["mask"] = np.where(inputs["mask"] > 0.5, np.float32(-1e9), np.float32(0))
    path = tmp_path / "given.onnx"
    torch.onnx.export(
        Module(groups, masked), tuple(torch.from_numpy(array) for array in inputs.values()), str(path), dynamo=True,
        opset_version=OPSET, input_names=list(inputs), output_names=["y"], external_data=False, verbose=False,
    )  # fmt: skip
    given = tuple(TensorSpec(name, shape) for name, shape in shapes.items())
    return path, StageInterface("attention", given, (TensorSpec("y", (1, rows, 192)),)), inputs


@pytest.mark.parametrize(("groups", "masked"), [(1, False), (1, True), (3, False), (3, True)])
def test_attention_of_a_file_is_found_and_runs(tmp_path, groups, masked):
    path, stage, inputs = written(tmp_path, groups, masked)
    runtime = get_backend("onnxruntime")
    assert not any(way.get("own_kernels") for way in runtime.candidates(path))  # of full precision it stays
    see_in_8_bits(path, "v")
    assert any(way.get("own_kernels") for way in runtime.candidates(path))
    exact = runtime.load(path, stage).run(inputs)["y"]
    place = tmp_path / "built"
    place.mkdir()
    built = runtime.build(path, place, stage, OWN)
    operators = [node.op_type for node in onnx.load(str(place / built.file)).graph.node]
    assert operators.count(OPERATOR) == 1 and not {"Softmax", "MatMul"} & set(operators)
    if groups == 1:  # heads and rows change places in the kernel alone
        assert "Transpose" not in operators
    found = runtime.load(place / built.file, stage, built.options).run(inputs)["y"]
    assert 0 < relative(found, exact) < 1e-3


def test_few_rows_and_other_sums_stay_the_runtimes(tmp_path):
    path, _, _ = written(tmp_path, rows=4)
    assert not Attentions(onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph).found
    model = onnx.shape_inference.infer_shapes(onnx.load(str(written(tmp_path, masked=True)[0])))
    assert len(Attentions(model.graph).found) == 1
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    seen = onnx.helper.make_tensor_value_info(softmax.output[0], onnx.TensorProto.FLOAT, (1, 6, 24, 40))
    model.graph.output.append(seen)  # somebody else reads the weights
    assert not Attentions(model.graph).found


def test_a_file_that_lies_about_its_shapes_is_refused(tmp_path):
    path, stage, inputs = written(tmp_path, masked=True)
    use_kernels(path)
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == OPERATOR)
    node.input[2] = node.input[0]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match="do not fit together"):
        get_backend("onnxruntime").load(path, stage, OWN).run(inputs)
