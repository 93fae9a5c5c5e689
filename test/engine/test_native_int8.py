"""Our kernel for 8-bit weights: its numbers in every way that this processor runs, and the files that use it."""

import ctypes
from dataclasses import replace

import numpy as np
import onnx
import pytest
from native_kernels import KERNELS, WAYS, shorten_weights
from scipy.special import erf

from vla_edge.engine.backends import BackendError, get_backend
from vla_edge.engine.lower import lower
from vla_edge.engine.native.int8_products import BLOCK, INPUTS, OPERATOR, Finish, pack, takes
from vla_edge.engine.native.rewrite import use_kernels
from vla_edge.engine.product import chain_file, in_precision, product_interface
from vla_edge.engine.trace import MARKER, MARKER_DOMAIN, OPSET
from vla_edge.engine.work import stage_work

pytestmark = pytest.mark.skipif(KERNELS is None, reason="the kernels are not compiled here")
ONE_THREAD = {"own_kernels": True, "threads": 1}


class Product(ctypes.Structure):
    """As native/int8_products.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "sums", "bias", "x", "norm", "shift")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("y", "rounded", "steps", "zeros")),
        *((name, ctypes.c_size_t) for name in ("rows", "inputs", "padded", "outputs")),
    ]


def multiply(way, x, codes, scales, bias=None, norm=None, shift=None, epsilon=0.0):
    """y, and the inputs as they were rounded with their zero points."""
    blocks, sums = pack(codes)
    rows, (inputs, outputs) = len(x), codes.shape
    steps = np.zeros(len(sums), np.float32)
    steps[:outputs] = scales
    padded = -(-inputs // INPUTS) * INPUTS
    y, rounded = np.full((rows, outputs), 7.0, np.float32), np.full((rows, padded), 99, np.uint8)
    found, zeros = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    given = [None if array is None else array.ctypes.data for array in (blocks, steps, sums, bias, x, norm, shift)]
    made = [array.ctypes.data for array in (y, rounded, found, zeros)]
    told = Product(*given, epsilon, *made, rows, inputs, padded, outputs)
    assert KERNELS.vla_edge_int8_product(ctypes.byref(told), way.encode()) == 0
    return y, rounded, zeros


def expected(x, codes, scales, bias=0.0):
    """In float64, of inputs on the grid that each row gets."""
    x = x.astype(np.float64)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = (high - low) / 255
    step = np.where(step, step, 1)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step @ codes.astype(np.float64) * scales + bias


def case(rows, inputs, outputs, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    x = rng.normal(rng.normal(size=(rows, 1)), np.exp(rng.normal(size=(rows, 1))), (rows, inputs)).astype(np.float32)
    return x, codes, rng.uniform(1e-3, 1e-1, outputs).astype(np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 256, 64), (2, 97, 100), (3, 64, 1), (4, 63, 65), (5, 384, 130), (6, 2, 64), (13, 130, 192)],
)
def test_is_the_product_of_rounded_inputs(way, rows, inputs, outputs):
    x, codes, scales = case(rows, inputs, outputs)
    bias = np.random.default_rng(1).normal(size=outputs).astype(np.float32)
    for added in (None, bias):
        found, rounded, zeros = multiply(way, x, codes, scales, added)
        wanted = expected(x, codes, scales, 0.0 if added is None else added.astype(np.float64))
        # a number half way between two steps may go to either
        assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)
        whole = rounded[:, :inputs].astype(np.int64) - zeros[:, None]
        of_integers = whole @ codes.astype(np.int64)
        steps = (np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)) / np.float32(255)
        exact = of_integers * steps[:, None].astype(np.float64) * scales + (0.0 if added is None else added)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("way", WAYS)
def test_extremes_do_not_overflow(way):
    """The largest weights and inputs there are, of the widest layer, which add up in whole numbers without loss."""
    inputs = 65536
    for code, sign in ((-127, 1), (127, 1), (-127, -1), (127, -1)):
        x, codes = np.full((2, inputs), 255.0 * sign, np.float32), np.full((inputs, BLOCK), code, np.int8)
        found, *_ = multiply(way, x, codes, np.ones(BLOCK, np.float32))
        np.testing.assert_allclose(found, 255.0 * sign * code * inputs, rtol=1e-6)


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen():
    x, codes, scales = case(5, 128, 64)
    x[0], x[1, 5], x[2, 70], x[3, 9] = 0, np.nan, np.inf, -np.inf
    found, *_ = multiply(WAYS[0], x, codes, scales)
    assert not found[0].any()
    assert not np.isfinite(found[1:4]).any()
    assert np.isfinite(found[4]).all()


def test_a_row_does_not_pay_for_another():
    """Where all rows share a grid, one that is a thousand times as large leaves nothing of the others."""
    x, codes, scales = case(4, 256, 64)
    alone, *_ = multiply(WAYS[0], x, codes, scales)
    x[0] *= 1000
    beside, *_ = multiply(WAYS[0], x, codes, scales)
    np.testing.assert_array_equal(beside[1:], alone[1:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inputs", [5, 64, 97])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_comes_before_the_rounding(way, inputs, centred):
    x, codes, scales = case(7, inputs, 70)
    rng = np.random.default_rng(4)
    norm, shift = (rng.normal(1, 0.5, inputs).astype(np.float32) for _ in range(2))
    found, *_ = multiply(way, x, codes, scales, None, norm, shift if centred else None, 1e-3)
    wide = x.astype(np.float64)
    wide = wide - wide.mean(1, keepdims=True) if centred else wide
    normed = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-3) * norm + (shift if centred else 0)
    wanted = expected(normed, codes, scales)
    # a number half way between two steps may go to either
    assert np.linalg.norm(found - wanted) <= 2e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_is_not_finite_is_seen_behind_a_norm(way):
    x, codes, scales = case(4, 40, 64)
    x[0, 3], x[1, 4], x[2] = np.nan, np.inf, 0
    ones = np.ones(40, np.float32)
    for shift in (None, ones):
        found, *_ = multiply(way, x, codes, scales, None, ones, shift, 1e-6)
        assert not np.isfinite(found[:2]).any() and np.isfinite(found[2:]).all()


def finish_(way, y, other, finish):
    """By the kernel, in place."""
    places = (ctypes.c_void_p(array.ctypes.data) for array in (y, other))
    sizes = (ctypes.c_size_t(size) for size in y.shape)
    assert KERNELS.vla_edge_int8_finish(*places, *sizes, int(finish), way.encode()) == 0


def finished(y, other, finish):
    """In float64."""
    if finish is Finish.ADDED:
        return y + other
    if finish is Finish.GATED:
        return y / (1 + np.exp(-y)) * other
    if finish is Finish.GELU_ERF:
        return y * (1 + erf(y / np.sqrt(2))) / 2
    return y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("finish", list(Finish)[1:])
@pytest.mark.parametrize("count", [1, 16, 61])
def test_outputs_are_finished_to_the_precision_of_float32(way, finish, count):
    rng = np.random.default_rng(6)
    given = [np.linspace(-30, 30, 5 * count), rng.normal(size=4 * count), np.zeros(count)]
    y = np.concatenate(given).astype(np.float32).reshape(-1, count)
    other = rng.normal(size=y.shape).astype(np.float32)
    wanted = finished(y.astype(np.float64), other, finish)
    finish_(way, y, other, finish)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=2e-6)


def test_what_is_not_finite_stays_so_when_outputs_are_finished():
    for finish in list(Finish)[1:]:
        y, other = np.array([[np.nan, 1.0]], np.float32), np.ones((1, 2), np.float32)
        finish_(WAYS[0], y, other, finish)
        assert np.isnan(y[0, 0]) and np.isfinite(y[0, 1])


def marker(name, x, y):
    return onnx.helper.make_node(MARKER, [x], [y], domain=MARKER_DOMAIN, layer=name)


def block_file(nodes, layers, constants, precision, width):
    """A stage file of nodes of which some are layers, (outputs, inputs) float32 each, of which some have a bias."""
    made = {}
    for name, (weight, bias) in layers.items():
        made[name] = replace(in_precision(weight, precision, 32), bias=bias)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, ROWS, width)) for name in ("x", "y"))
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "block", [x], [y], tensors),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MARKER_DOMAIN, 1)],
    )
    return lower(graph, made, {}, "block").SerializeToString()


ROWS, WIDTH, HIDDEN = 9, 48, 70


def block(kind, rng):
    """Nodes, layers and constants of half a transformer's block, as exporters write it."""
    node = onnx.helper.make_node

    def weight(outputs, inputs, biased=True):
        bias = rng.normal(size=outputs).astype(np.float32) if biased else None
        return rng.normal(0, 0.2, (outputs, inputs)).astype(np.float32), bias

    scale, shift = rng.normal(1, 0.3, WIDTH).astype(np.float32), rng.normal(size=WIDTH).astype(np.float32)
    constants = {"scale": scale, "two": np.float32(2), "axes": np.array([-1]), "epsilon": np.float32(1e-5)}
    rms = [
        node("Pow", ["x", "two"], ["squares"]), node("ReduceMean", ["squares", "axes"], ["mean"], keepdims=1),
        node("Add", ["mean", "epsilon"], ["moved"]), node("Sqrt", ["moved"], ["root"]),
        node("Div", ["x", "root"], ["even"]), node("Mul", ["even", "scale"], ["normed"]),
    ]  # fmt: skip
    if kind == "gated":
        nodes = [
            *rms, marker("gate", "normed", "a"), node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["silu"]),
            marker("up", "normed", "b"), node("Mul", ["silu", "b"], ["h"]), marker("down", "h", "d"),
            node("Add", ["x", "d"], ["y"]),
        ]  # fmt: skip
        layers = {"gate": weight(HIDDEN, WIDTH, False), "up": weight(HIDDEN, WIDTH), "down": weight(WIDTH, HIDDEN)}
        return nodes, layers, constants
    if kind == "gelu":
        nodes = [
            node("LayerNormalization", ["x", "scale", "shift"], ["normed"], axis=-1, epsilon=1e-4),
            marker("up", "normed", "b"), node("Gelu", ["b"], ["h"], approximate="tanh"), marker("down", "h", "d"),
            node("Add", ["d", "x"], ["y"]),
        ]  # fmt: skip
        layers = {"up": weight(HIDDEN, WIDTH), "down": weight(WIDTH, HIDDEN, False)}
        return nodes, layers, {"scale": scale, "shift": shift}
    nodes = [
        *rms, *(marker(name, "normed", name) for name in "qkv"),
        node("Mul", ["q", "k"], ["qk"]), node("Tanh", ["v"], ["t"]), node("Add", ["qk", "t"], ["y"]),
    ]  # fmt: skip
    return nodes, {name: weight(WIDTH, WIDTH, name == "k") for name in "qkv"}, constants


@pytest.mark.parametrize("precision", ["int8 dynamic", "int8 weights"])
@pytest.mark.parametrize(
    ("kind", "finishes", "others"),
    [("gated", [Finish.GATED, Finish.ADDED], []), ("gelu", [Finish.GELU_TANH, Finish.ADDED], []),
     ("attention", [Finish.PLAIN], ["Mul", "Tanh", "Add"])],
)  # fmt: skip
def test_what_goes_with_layers_goes_into_them(kind, finishes, others, precision, tmp_path):
    rng = np.random.default_rng(8)
    nodes, layers, constants = block(kind, rng)
    path, stage = tmp_path / "block.onnx", product_interface(ROWS, WIDTH, WIDTH)
    inputs = {"x": rng.normal(size=(1, ROWS, WIDTH)).astype(np.float32)}
    path.write_bytes(block_file(nodes, layers, constants, "int8 weights", WIDTH))
    exact = get_backend("onnxruntime").load(path, stage).run(inputs)["y"]
    path.write_bytes(block_file(nodes, layers, constants, precision, WIDTH))
    use_kernels(path)
    graph = onnx.load(str(path)).graph
    ours = [node for node in graph.node if node.op_type == OPERATOR]
    told = [{attribute.name: attribute.i for attribute in node.attribute}["finish"] for node in ours]
    assert told == finishes and [node.op_type for node in graph.node if node.op_type != OPERATOR] == others
    found = get_backend("onnxruntime").load(path, stage, ONE_THREAD).run(inputs)["y"]
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)
    operations = 2.0 * ROWS * sum(weight.size for weight, _ in layers.values())
    assert stage_work(path).flops == {"int8": operations}


@pytest.mark.parametrize("change", ["output", "width", "norm"])
def test_a_file_that_lies_about_its_layers_is_refused(change, tmp_path):
    path, stage = tmp_path / "block.onnx", product_interface(ROWS, WIDTH, WIDTH)
    path.write_bytes(block_file(*block("attention", np.random.default_rng(8)), "int8 dynamic", WIDTH))
    use_kernels(path)
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == OPERATOR)
    if change == "output":
        left = node.output[-1]
        for reader in model.graph.node:
            reader.input[:] = [node.output[0] if name == left else name for name in reader.input]
        del node.output[-1]
    elif change == "width":
        widths = next(constant for constant in model.graph.initializer if constant.name == node.input[4])
        widths.CopyFrom(onnx.numpy_helper.from_array(np.array([WIDTH, WIDTH, 2**40]), widths.name))
    else:
        node.input[6] = node.input[5]  # a bias, of all layers together
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BackendError):
        get_backend("onnxruntime").load(path, stage, ONE_THREAD).run({"x": np.ones((1, ROWS, WIDTH), np.float32)})


def test_a_norm_that_others_read_too_stays(tmp_path):
    rng = np.random.default_rng(8)
    nodes, layers, constants = block("gelu", rng)
    nodes[-1] = onnx.helper.make_node("Add", ["d", "normed"], ["y"])
    path = tmp_path / "block.onnx"
    path.write_bytes(block_file(nodes, layers, constants, "int8 dynamic", WIDTH))
    use_kernels(path)
    operators = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert operators == ["LayerNormalization", OPERATOR, OPERATOR]


@pytest.fixture(params=["int8 dynamic", "int8 weights"])
def stage_file(request, tmp_path):
    """Two layers of 8-bit weights, one after the other; inputs rounded by the file or not."""
    rng = np.random.default_rng(3)
    weights = [rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((100, 130), (64, 100))]
    layers = [in_precision(weight, request.param, 32) for weight in weights]
    path = tmp_path / "given.onnx"
    path.write_bytes(chain_file(layers, 3))
    return path, product_interface(3, 130, 64), {"x": rng.normal(size=(1, 3, 130)).astype(np.float32)}


def test_onnxruntime_offers_and_runs_it(request, stage_file, tmp_path):
    path, stage, inputs = stage_file
    runtime = get_backend("onnxruntime")
    ways = [way for way in runtime.candidates(path) if way.get("own_kernels")]
    assert ways and not any(way["exact"] for way in ways)
    # a grid for each row is no coarser than the file's; inputs that it leaves alone are another matter
    dynamic = "dynamic" in request.node.callspec.id
    assert {way.get("finer", False) for way in ways} == {dynamic}
    exact = runtime.load(path, stage).run(inputs)["y"]
    for index, way in enumerate(ways):
        place = tmp_path / str(index)
        place.mkdir()
        built = runtime.build(path, place, stage, way)
        graph = onnx.load(str(place / built.file)).graph
        assert [node.op_type for node in graph.node] == [OPERATOR, OPERATOR]
        found = runtime.load(place / built.file, stage, built.options).run(inputs)["y"]
        assert 0 < np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)
        assert stage_work(place / built.file).flops == {"int8": 2.0 * 3 * 100 * (130 + 64)}


def test_a_bias_is_added_by_it(stage_file, tmp_path):
    path, stage, inputs = stage_file
    model = onnx.load(str(path))
    graph, last = model.graph, model.graph.node[-1]
    bias = np.random.default_rng(5).normal(size=64).astype(np.float32)
    graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
    last.output[0] = "before"
    graph.node.append(onnx.helper.make_node("Add", ["before", "bias"], ["y"], "add"))
    without = get_backend("onnxruntime").load(path, stage).run(inputs)["y"]
    path.write_bytes(model.SerializeToString())
    use_kernels(path)
    assert [node.op_type for node in onnx.load(str(path)).graph.node] == [OPERATOR, OPERATOR]
    found = get_backend("onnxruntime").load(path, stage, ONE_THREAD).run(inputs)["y"]
    assert np.linalg.norm(found - without - bias) < 0.02 * np.linalg.norm(without)


def test_inputs_on_a_grid_of_the_recipe_stay_on_it(tmp_path):
    """Static grids, groups of weights and weights around another point than zero are not for it."""
    rng = np.random.default_rng(3)
    path = tmp_path / "given.onnx"
    path.write_bytes(chain_file([in_precision(rng.normal(size=(64, 64)).astype(np.float32), "int8 weights", 32)], 3))
    model = onnx.load(str(path))
    assert len(takes(model.graph)) == 1
    weights = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    for change in ("zero", "block", "grid"):
        other = onnx.ModelProto.FromString(model.SerializeToString())
        source = next(node for node in other.graph.node if node.name == weights.name)
        if change == "zero":
            moved = np.full(64, 3, np.int8)
            other.graph.initializer.append(onnx.numpy_helper.from_array(moved, "moved"))
            source.input[2] = "moved"
        elif change == "block":
            source.attribute.append(onnx.helper.make_attribute("block_size", 32))
        else:
            grid = onnx.helper.make_node("DequantizeLinear", ["codes", "step"], [product.input[0]], "grid")
            other.graph.node.insert(0, grid)
        assert not takes(other.graph), change


def test_a_file_that_lies_about_its_weights_is_refused(stage_file):
    path, stage, inputs = stage_file
    use_kernels(path)
    shorten_weights(path, 1)
    with pytest.raises(BackendError, match="do not fit together"):
        get_backend("onnxruntime").load(path, stage, ONE_THREAD).run(inputs)
