"""MLX computes what a stage's file says, in its build for processors."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from runtime_contract import RuntimeContract
from toy import compressed, even_stage, interface

from vla_edge.engine.export import export_stage

pytestmark = pytest.mark.peers
pytest.importorskip("mlx.core", reason="mlx is not installed")


class TestMLX(RuntimeContract):
    NAME, SUFFIX = "mlx", "onnx"
    DAMAGED, OTHER = "cannot read stage file", "takes x in the shape"

    @pytest.mark.parametrize("precision", ["int8", "int4", "int4 foreign", "int8 static foreign"])
    def test_weights_stay_packed_where_the_library_multiplies_them(self, runtime, tmp_path, monkeypatch, precision):
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
