"""Our kernel for 4-bit weights: its numbers in every way that this processor runs, and the files that use it."""

import ctypes
import shutil

import numpy as np
import onnx
import pytest
from native_kernels import KERNELS, WAYS, shorten_weights

from vla_edge.engine import native
from vla_edge.engine.backends import BackendError, beside, get_backend
from vla_edge.engine.backends.cpu import processor
from vla_edge.engine.export import ConstantStore
from vla_edge.engine.native import library
from vla_edge.engine.native.int4_products import BLOCK, OPERATOR, pack
from vla_edge.engine.native.rewrite import use_kernels
from vla_edge.engine.product import chain_file, in_precision, product_interface
from vla_edge.engine.work import stage_work

ONE_THREAD = {"own_kernels": True, "threads": 1}


class Product(ctypes.Structure):
    """As native/int4_products.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "largest", "x", "y", "rounded", "steps", "shifts")),
        *((name, ctypes.c_size_t) for name in ("rows", "inputs", "outputs", "group")),
    ]


def multiply(kernel, way, x, codes, scales, group):
    packed = [np.ascontiguousarray(array) for array in pack(codes, scales)]
    rows, (inputs, outputs) = len(x), codes.shape
    y = np.full((rows, outputs), 7.0, np.float32)
    rounded, steps = np.zeros((rows, inputs), np.int8), np.zeros((2, rows, inputs // group), np.float32)
    places = [array.ctypes.data for array in (*packed, x, y, rounded, steps[0], steps[1])]
    assert kernel.vla_edge_int4_product(ctypes.byref(Product(*places, rows, inputs, outputs, group)), way.encode()) == 0
    return y


@pytest.fixture
def kernel():
    if KERNELS is None:
        pytest.skip("the kernels are not compiled here")
    return KERNELS


def expected(x, codes, scales, group):
    """In float64, of inputs on the grid that each group gets."""
    grouped = x.astype(np.float64).reshape(len(x), -1, group)
    step = np.abs(grouped).max(-1, keepdims=True) / 127
    rounded = (np.rint(grouped / np.where(step, step, 1)) * step).reshape(x.shape)
    return rounded @ (codes * np.repeat(scales, group, 0)).astype(np.float64)


def case(rows, inputs, outputs, group, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (inputs, outputs)).astype(np.int8)
    scales = rng.uniform(1e-3, 1e-1, (inputs // group, outputs)).astype(np.float32)
    return rng.normal(size=(rows, inputs)).astype(np.float32), codes, scales


def test_is_installed_where_it_can_run():
    flags = processor().flags
    able = {"avx2", "fma"} <= flags or {"asimddp"} <= flags
    if shutil.which("cc") is None or not able:
        pytest.skip("no C compiler, or a processor without the instructions")
    assert library() is not None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group"),
    [(1, 256, 64, 128), (2, 96, 100, 32), (3, 64, 1, 8), (4, 64, 65, 16), (5, 384, 130, 128), (11, 128, 192, 64)],
)
def test_is_the_product_of_rounded_inputs(kernel, way, rows, inputs, outputs, group):
    x, codes, scales = case(rows, inputs, outputs, group)
    found, wanted = multiply(kernel, way, x, codes, scales, group), expected(x, codes, scales, group)
    # float16 scales are what is left: half a unit in their last place
    assert np.linalg.norm(found - wanted) <= 2**-11 * np.linalg.norm(wanted)


@pytest.mark.parametrize("way", WAYS)
def test_extremes_do_not_overflow(kernel, way):
    """The largest weights and inputs there are, which add up in whole numbers without loss."""
    inputs, group = 4096, 4096
    for code, sign in ((-8, 1), (7, 1), (-8, -1), (7, -1)):
        x, codes = np.full((2, inputs), 127.0 * sign, np.float32), np.full((inputs, BLOCK), code, np.int8)
        found = multiply(kernel, way, x, codes, np.ones((1, BLOCK), np.float32), group)
        np.testing.assert_allclose(found, 127.0 * sign * code * inputs, rtol=1e-6)


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(kernel):
    x, codes, scales = case(4, 128, 64, 32)
    x[0], x[1, 5], x[2, 70] = 0, np.nan, np.inf
    scales[:, 3] = 0
    found = multiply(kernel, WAYS[0], x, codes, scales, 32)
    assert not found[0].any() and not found[3, 3].any()
    assert not np.isfinite(found[1:3]).any()
    assert np.isfinite(found[3]).all()


def test_scales_of_any_size_keep_their_precision(kernel):
    """Beyond what float16 can hold, as long as one output's scales are of like size."""
    x, codes, scales = case(2, 128, 64, 32)
    sizes = np.logspace(-12, 8, 64, dtype=np.float32)
    way = WAYS[0]
    found, wanted = multiply(kernel, way, x, codes, scales * sizes, 32), expected(x, codes, scales * sizes, 32)
    np.testing.assert_allclose(found / sizes, wanted / sizes, rtol=0, atol=1e-3 * np.abs(wanted / sizes).max())


def test_groups_have_to_be_of_eight():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(np.zeros((24, 8), np.int8), np.ones((2, 8), np.float32))


@pytest.fixture
def stage_file(tmp_path):
    """Two layers of 4-bit weights, one after the other, and what goes with them."""
    rng = np.random.default_rng(3)
    weights = [rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((100, 128), (64, 100))]
    layers = [in_precision(weights[0], "int4 weights", 32), in_precision(weights[1], "float32", 32)]
    path = tmp_path / "given.onnx"
    path.write_bytes(chain_file(layers, 3))
    return path, product_interface(3, 128, 64), {"x": rng.normal(size=(1, 3, 128)).astype(np.float32)}


def test_onnxruntime_offers_and_runs_it(kernel, stage_file, tmp_path):
    path, stage, inputs = stage_file
    runtime = get_backend("onnxruntime")
    ways = [way for way in runtime.candidates(path) if way.get("own_kernels")]
    assert ways and not any(way["exact"] or way.get("finer") for way in ways)
    exact = runtime.load(path, stage).run(inputs)["y"]
    for index, way in enumerate(ways):
        place = tmp_path / str(index)
        place.mkdir()
        built = runtime.build(path, place, stage, way)
        model = onnx.load(str(place / built.file))
        assert [node.op_type for node in model.graph.node] == [OPERATOR, "MatMul"]
        assert all(constant.data_type != onnx.TensorProto.INT4 for constant in model.graph.initializer)
        loaded = runtime.load(place / built.file, stage, built.options)
        found = loaded.run(inputs)["y"]
        assert 0 < np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)
        outputs = {"y": np.zeros((1, 3, 64), np.float32)}
        loaded.bind(inputs, outputs)()
        np.testing.assert_array_equal(outputs["y"], found)
        work = stage_work(place / built.file)
        assert work.flops == {"int8": 2.0 * 3 * 128 * 100, "float32": 2.0 * 3 * 100 * 64}
    given = onnx.load(str(path)).graph
    assert "DequantizeLinear" in {node.op_type for node in given.node}  # it is as it was


def test_stages_share_large_constants(kernel, stage_file, tmp_path, monkeypatch):
    """Two stages with the same layer have its weights on the disk once, and nothing of the files that they came in."""
    monkeypatch.setattr("vla_edge.engine.export.LARGEST_FILE", 0)
    path, stage, inputs = stage_file
    model, store = onnx.load(str(path)), ConstantStore(tmp_path)
    whole = get_backend("onnxruntime").load(path, stage).run(inputs)["y"]
    runtime, place = get_backend("onnxruntime"), tmp_path / "bundle"
    place.mkdir()
    for name in ("prefill", "decode"):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        with store.taking(f"{name}.weights") as take:
            for constant in copy.graph.initializer:
                take(constant)
        given = tmp_path / f"{name}.onnx"
        given.write_bytes(copy.SerializeToString())
        runtime.build(given, place, type(stage)(name, stage.inputs, stage.outputs), ONE_THREAD)
    used = beside(place / "prefill.onnx")
    assert used and used == beside(place / "decode.onnx")
    assert {file.name for file in place.iterdir()} == {"prefill.onnx", "decode.onnx", *used}
    for name in ("prefill", "decode"):
        found = runtime.load(place / f"{name}.onnx", stage, ONE_THREAD).run(inputs)["y"]
        assert np.linalg.norm(found - whole) < 0.01 * np.linalg.norm(whole)


def test_a_file_that_lies_about_its_weights_is_refused(kernel, stage_file):
    path, stage, inputs = stage_file
    use_kernels(path)
    shorten_weights(path, 0)
    with pytest.raises(BackendError, match="do not fit together"):
        get_backend("onnxruntime").load(path, stage, ONE_THREAD).run(inputs)


def test_without_it_an_engine_that_needs_it_says_so(kernel, stage_file, tmp_path, monkeypatch):
    path, stage, _ = stage_file
    runtime = get_backend("onnxruntime")
    (tmp_path / "built").mkdir()
    built = runtime.build(path, tmp_path / "built", stage, ONE_THREAD)
    for reader in ("native.rewrite", "backends.onnxruntime"):
        monkeypatch.setattr(f"vla_edge.engine.{reader}.library", lambda: None)
    assert not any(way.get("own_kernels") for way in runtime.candidates(path))
    with pytest.raises(BackendError, match="C compiler"):
        runtime.load(tmp_path / "built" / built.file, stage, built.options)


def test_kernels_of_another_computer_are_not_used(tmp_path, monkeypatch):
    (tmp_path / "_kernels.so").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    assert native.library.__wrapped__() is None
