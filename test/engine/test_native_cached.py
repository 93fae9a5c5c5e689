"""Our attention to a cache that is read where it lies: in every way that this processor runs, and in the files that use it."""

import ctypes

import numpy as np
import onnx
import pytest
from language_subject import Subject
from native_kernels import KERNELS, WAYS

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.export import export_stage
from vla_edge.engine.native.cached_attention import OPERATOR, takes
from vla_edge.engine.native.rewrite import use_kernels
from vla_edge.engine.work import stage_work

pytestmark = pytest.mark.skipif(KERNELS is None, reason="the kernels are not compiled here")
OWN = {"own_kernels": True, "threads": 1}


class CachedAttention(ctypes.Structure):
    """As native/cached_attention.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "bias", "own_k", "own_v", "own_bias", "y")),
        *((name, ctypes.c_size_t) for name in ("heads", "groups", "rows", "tokens", "behind", "depth")),
        ("scale", ctypes.c_float),
    ]


def attend(way, q, k, v, bias, own_k, own_v, own_bias, scale):
    """y, (rows, heads * groups, depth)."""
    (all_heads, rows, depth), (heads, tokens, _) = q.shape, k.shape
    y = np.full((rows, all_heads, depth), 7.0, np.float32)
    places = [array.ctypes.data for array in (q, k, v, bias, own_k, own_v, own_bias, y)]
    told = CachedAttention(*places, heads, all_heads // heads, rows, tokens, own_k.shape[1], depth, scale)
    assert KERNELS.vla_edge_cached_attention(ctypes.byref(told), way.encode()) == 0
    return y


def expected(q, k, v, bias, own_k, own_v, own_bias, scale):
    """In float64."""
    groups = len(q) // len(k)
    keys, values = (np.repeat(np.concatenate(pair, axis=1).astype(np.float64), groups, 0) for pair in ((k, own_k), (v, own_v)))
    added = np.concatenate([np.broadcast_to(bias, (q.shape[1], len(bias))), own_bias], axis=1)
    scores = scale * q @ keys.transpose(0, 2, 1) + added
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ values).transpose(1, 0, 2)


def case(heads, groups, rows, tokens, behind, depth, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (heads * groups, rows, depth), (heads, tokens, depth), (heads, tokens, depth), (tokens,), (heads, behind, depth),
        (heads, behind, depth), (rows, behind),
    )  # fmt: skip
    q, k, v, bias, own_k, own_v, own_bias = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    bias[rng.random(tokens) < 0.3] = -1e4
    own_bias[rng.random((rows, behind)) < 0.3] = -1e4
    return q, k, v, bias, own_k, own_v, own_bias


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("heads", "groups", "rows", "tokens", "behind", "depth"),
    [(1, 1, 1, 1, 1, 16), (2, 1, 1, 33, 6, 128), (3, 2, 5, 85, 7, 32), (2, 8, 4, 300, 40, 80), (1, 1, 7, 16, 16, 256)],
)
def test_is_the_attention_of_float64(way, heads, groups, rows, tokens, behind, depth):
    given = case(heads, groups, rows, tokens, behind, depth)
    for scale in (0.1 * depth**-0.5, depth**-0.5, 8.0):
        np.testing.assert_allclose(attend(way, *given, scale), expected(*given, scale), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_is_seen(way):
    for place in (0, 1, 2, 4, 5):  # q, k, v and what is behind
        given = case(2, 1, 3, 20, 4, 32)
        given[3][:], given[6][:] = 0, 0
        given[place][0, 1, 5] = np.nan
        found = attend(way, *given, 0.2)
        assert np.isnan(found[:, 0]).any() and np.isfinite(found[:, 1]).all()


def decoding(tmp_path, mode):
    """File, interface and inputs of a stage that decodes, in full precision."""
    policy = Subject("int4", 32).policy
    {"decode": lambda: None, "verify": lambda: policy.speculate_(2), "revise": policy.revise_}[mode]()
    stage = next(stage for stage in policy.stages() if stage.name == mode)
    path = export_stage(stage, {}, tmp_path / "given.onnx")
    rng = np.random.default_rng(0)
    inputs = {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in stage.inputs}
    inputs["cache_mask"] = (np.arange(inputs["cache_mask"].size) < 15).astype(np.float32)[None]
    for spec in stage.inputs:
        if spec.dtype == "int64":
            inputs[spec.name] = rng.integers(1, 3, spec.shape)
    return path, StageInterface(stage.name, stage.inputs, stage.outputs), inputs


@pytest.mark.parametrize("mode", ["decode", "verify", "revise"])
def test_attention_of_a_file_is_found_and_runs(tmp_path, mode):
    path, stage, inputs = decoding(tmp_path, mode)
    runtime = get_backend("onnxruntime")
    exact, work = runtime.load(path, stage).run(inputs), stage_work(path)
    use_kernels(path)
    nodes = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert nodes.count(OPERATOR) == 2 and not {"Softmax", "Slice"} & set(nodes)
    assert stage_work(path).attention_flops == work.attention_flops
    for threads in (1, 2):
        found = runtime.load(path, stage, OWN | {"threads": threads}).run(inputs)
        for name, wanted in exact.items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-4)


def test_what_is_cut_elsewhere_stays_the_runtimes(tmp_path):
    path, _, _ = decoding(tmp_path, "decode")
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    assert [found.layer for found in takes(model.graph)] == [0, 1]
    cut = next(node for node in model.graph.node if node.op_type == "Slice")
    later = onnx.numpy_helper.from_array(np.array([1], np.int64), "later")
    model.graph.initializer.append(later)
    cut.input[1] = "later"
    assert len(takes(model.graph)) == 1
    for softmax in (node for node in model.graph.node if node.op_type == "Softmax"):
        next(attribute for attribute in softmax.attribute if attribute.name == "axis").i = 1
    assert not takes(model.graph)


def test_a_file_that_lies_about_its_shapes_is_refused(tmp_path):
    path, stage, inputs = decoding(tmp_path, "decode")
    use_kernels(path)
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == OPERATOR)
    next(attribute for attribute in node.attribute if attribute.name == "layer").i = 2
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match="do not fit together"):
        get_backend("onnxruntime").load(path, stage, OWN).run(inputs)
