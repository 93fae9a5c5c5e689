"""MLX computes what a stage's file says, in its build for processors."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from toy import PRECISIONS, compressed, even_stage, interface, toy_inputs

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.export import export_stage
from vla_edge.policy.stages import TensorSpec

pytestmark = pytest.mark.peers
pytest.importorskip("mlx.core", reason="mlx is not installed")
runtime = get_backend("mlx")


@pytest.fixture
def build(toy, tmp_path):
    """A precision -> the stage's interface, its lowered file, and what the reference evaluator makes of the original."""

    def build(precision: str):
        stage, graph = toy
        source = export_stage(stage, compressed(stage, precision), tmp_path / "toy.onnx", graph)
        evaluator = ReferenceEvaluator(str(source))
        expected = dict(zip(evaluator.output_names, evaluator.run(None, toy_inputs())))
        built = runtime.build(source, tmp_path, interface(stage), {"threads": 1})
        return interface(stage), tmp_path / built.file, expected

    return build


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp8 static"])
def test_it_agrees_with_the_reference_evaluator(build, precision):
    stage, file, expected = build(precision)
    for name, value in runtime.load(file, stage).run(toy_inputs()).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4", "int4 foreign", "int8 static foreign"])
def test_weights_stay_packed_where_the_library_multiplies_them(tmp_path, monkeypatch, precision):
    import toy as layers
    from mlx.core import quantized_matmul

    from vla_edge.engine.backends import onnx_mlx

    seen = []
    monkeypatch.setattr(onnx_mlx.mx, "quantized_matmul", lambda *a, **k: seen.append(k) or quantized_matmul(*a, **k))
    monkeypatch.setitem(layers.GROUPS, "int4", 32)
    stage = even_stage()
    source = export_stage(stage, compressed(stage, precision), tmp_path / "even.onnx")
    inputs = {"x": np.random.default_rng(5).normal(size=(1, 8, 64)).astype(np.float32)}
    (expected,) = ReferenceEvaluator(str(source)).run(None, inputs)
    got = runtime.load(source, interface(stage)).run(inputs)
    np.testing.assert_allclose(got["y"], expected, atol=1e-4)
    assert [k["bits"] for k in seen] == [int(precision[3])]  # 48 inputs of the second layer make no whole group


def test_binding_writes_in_place_again_and_again(build):
    stage, file, expected = build("float32")
    outputs = {spec.name: spec.zeros() for spec in stage.outputs}
    inputs = {spec.name: spec.zeros() for spec in stage.inputs}
    step = runtime.load(file, stage).bind(inputs, outputs)
    step()
    assert np.abs(outputs["y"] - expected["y"]).max() > 1e-3
    for name, value in toy_inputs().items():
        inputs[name][:] = value
    step()
    np.testing.assert_allclose(outputs["y"], expected["y"], atol=1e-4)


def test_an_engine_of_all_stages_acts_like_the_policy(checkpoint, data, tmp_path):
    from tiny import make_observations

    from vla_edge.engine.build import build
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.runner import Runner

    path = build(checkpoint, "fp32", "mlx", tmp_path / "engine", data)
    assert {(entry.backend, entry.file.rpartition(".")[2]) for entry in Bundle.load(path).stages} == {("mlx", "onnx")}
    ours, reference = Runner.from_bundle(path), Runner.from_checkpoint(checkpoint)
    for observation in make_observations(3):
        got, expected = (runner.infer(observation, seed=1).chunk.positions for runner in (ours, reference))
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_damaged_file_and_other_tensors_are_backend_errors(build, tmp_path):
    stage, file, _ = build("float32")
    (tmp_path / "bad.onnx").write_bytes(file.read_bytes()[:200])
    with pytest.raises(BackendError, match="cannot read stage file"):
        runtime.load(tmp_path / "bad.onnx", stage)
    other = StageInterface("toy", (TensorSpec("x", (1, 2, 40)), *stage.inputs[1:]), stage.outputs)
    with pytest.raises(BackendError, match="takes x in the shape"):
        runtime.load(file, other)


def test_the_table_of_runtimes_says_that_it_ran(monkeypatch):
    from vla_edge.engine import overview

    monkeypatch.setattr(overview, "BACKENDS", {"mlx": ("", "")})
    (row,) = overview.overview()
    assert set(row.ran) == set(overview.PRECISIONS) and not row.refused
