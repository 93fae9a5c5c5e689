"""What a runtime owes a stage's file, asked of each that is installed beside the others."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from toy import PRECISIONS, TOKENS, compressed, interface, toy_inputs, words_stage

from vla_edge.engine.backends import BackendError, StageInterface, get_backend
from vla_edge.engine.export import export_stage
from vla_edge.policy.stages import TensorSpec


class RuntimeContract:
    """Tests of one backend; a subclass says which.

    Attributes:
        NAME: of the backend. SUFFIX: of the files it builds.
        DAMAGED, OTHER: what it says of a file that was cut, and of an interface that is not the file's.
    """

    NAME: str
    SUFFIX: str
    DAMAGED = "cannot load stage file"
    OTHER: str

    @pytest.fixture
    def runtime(self):
        return get_backend(self.NAME)

    @pytest.fixture
    def build(self, runtime, toy, tmp_path):
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
    def test_it_agrees_with_the_reference_evaluator(self, runtime, build, precision):
        stage, file, expected = build(precision)
        for name, value in runtime.load(file, stage).run(toy_inputs()).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-4)

    def test_it_takes_rows_of_a_table_in_bfloat16(self, runtime, tmp_path, monkeypatch):
        monkeypatch.setattr("vla_edge.engine.lower.LEAST_TABLE", 1000)
        stage = words_stage()
        source = export_stage(stage, {}, tmp_path / "words.onnx")
        expected = ReferenceEvaluator(str(source)).run(None, {"tokens": TOKENS})[0]
        built = runtime.build(source, tmp_path, interface(stage), {"threads": 1})
        found = runtime.load(tmp_path / built.file, interface(stage)).run({"tokens": TOKENS})["y"]
        np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_binding_writes_in_place_again_and_again(self, runtime, build):
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

    @pytest.mark.timeout(600)  # some convert every stage for minutes
    def test_an_engine_of_all_stages_acts_like_the_policy(self, checkpoint, data, tmp_path):
        from tiny import make_observations

        from vla_edge.engine.build import build
        from vla_edge.engine.bundle import Bundle
        from vla_edge.engine.runner import Runner

        path = build(checkpoint, "fp32", self.NAME, tmp_path / "engine", data)
        built = {(entry.backend, entry.file.rpartition(".")[2]) for entry in Bundle.load(path).stages}
        assert built == {(self.NAME, self.SUFFIX)}
        ours, reference = Runner.from_bundle(path), Runner.from_checkpoint(checkpoint)
        for observation in make_observations(3):
            got, expected = (runner.infer(observation, seed=1).chunk.positions for runner in (ours, reference))
            np.testing.assert_allclose(got, expected, atol=1e-4)

    def test_a_damaged_file_and_other_tensors_are_backend_errors(self, runtime, build, tmp_path):
        stage, file, _ = build("float32")
        bad = tmp_path / f"bad.{self.SUFFIX}"
        bad.write_bytes(file.read_bytes()[:200])
        with pytest.raises(BackendError, match=self.DAMAGED):
            runtime.load(bad, stage)
        other = StageInterface("toy", (TensorSpec("x", (1, 2, 40)), *stage.inputs[1:]), stage.outputs)
        with pytest.raises(BackendError, match=self.OTHER):
            runtime.load(file, other)

    def test_the_table_of_runtimes_says_that_it_ran(self, monkeypatch):
        from vla_edge.engine import overview

        monkeypatch.setattr(overview, "BACKENDS", {self.NAME: ("", "")})
        (row,) = overview.overview()
        assert set(row.ran) == set(overview.PRECISIONS) and not row.refused
