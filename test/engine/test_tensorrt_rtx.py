"""Every precision we write is taken by TensorRT's parser and built ahead of time, with no GPU at hand.

Tensor cores differ by generation: SM86 stands for Orin's precisions, SM89 has FP8, SM120 has FP4 as well. What is built
cannot be run here; that the numbers are right is held by the other runtimes of the same files.
"""

from __future__ import annotations

import pytest
from toy import PRECISIONS, compressed

from vla_edge.engine.export import export_stage
from vla_edge.policy.stages import Stage, TensorSpec

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def plan(path, capability: str) -> bytes | None:
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(path.read_bytes()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    built = builder.build_serialized_network(network, config)
    return None if built is None else bytes(built)


@pytest.fixture(scope="module")
def stage():
    """Two layers of even widths: TensorRT takes 4-bit constants of an even number of values only."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.ModuleDict({"up": nn.Linear(64, 48), "down": nn.Linear(48, 16, bias=False)})

    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = module

        def forward(self, x):
            return (self.layers["down"](self.layers["up"](x).tanh()),)

    return Stage("even", Even().eval(), (TensorSpec("x", (1, 8, 64)),), (TensorSpec("y", (1, 8, 16)),))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_generation_that_has_the_precision_builds_it_and_older_ones_refuse(stage, tmp_path, precision):
    if precision.startswith("int8 "):
        pytest.skip("inputs rounded to unsigned integers are for CPUs; TensorRT's grids are symmetric")
    path = export_stage(stage, compressed(stage, precision), tmp_path / "even.onnx")
    needs = {"fp8": "SM89", "nvfp4": "SM120"}.get(precision.split()[0], "SM86")
    for capability in ("SM86", "SM89", "SM120"):
        assert (plan(path, capability) is not None) == (int(capability[2:]) >= int(needs[2:])), capability
