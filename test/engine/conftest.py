"""A tiny checkpoint, an engine built of it, and a toy stage with one of every kind of layer."""

from __future__ import annotations

import pytest
from tiny import WORDS, make_observations, tiny_policy, tiny_spec

from vla_edge.compress.calibrate import CalibrationData, collect
from vla_edge.policy.stages import Stage, TensorSpec


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Directory of the tiny checkpoint."""
    from vla_edge.policy.checkpoint_writer import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("robot") / "checkpoint", tiny_policy(), tiny_spec(), WORDS)


@pytest.fixture(scope="session")
def data() -> CalibrationData:
    return collect(make_observations(48), "random observations", frames=24, held_out=8)


@pytest.fixture(scope="session")
def traced() -> dict:
    """Shared by all builds of the tiny checkpoint."""
    return {}


@pytest.fixture(scope="session")
def bundle(checkpoint, data, traced, tmp_path_factory):
    """Directory of an int8 bundle of the tiny checkpoint; not to be changed."""
    from vla_edge.engine.build import build

    output = tmp_path_factory.mktemp("bundles") / "int8"
    return build(checkpoint, "int8", "onnxruntime", output, data, traced=traced)


@pytest.fixture(scope="session")
def toy():
    """(stage, traced graph): layers with and without bias, three that share an input, widths no group divides."""
    import torch
    from torch import nn

    from vla_edge.engine.export import trace

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(40, 24), nn.Linear(40, 24), nn.Linear(40, 24)
            self.norm = nn.LayerNorm(24)
            self.up = nn.Linear(24, 37, bias=False)
            self.inner = nn.ModuleDict({"down": nn.Linear(37, 7)})

        def forward(self, x, shift):
            weights = (self.q(x) @ self.k(x).transpose(-1, -2) / 8).softmax(-1)
            h = self.norm(weights @ self.v(x) + shift[:, None])
            return (self.inner["down"](torch.relu(self.up(h))), h)

    torch.manual_seed(1)
    tensors = TensorSpec("x", (1, 9, 40)), TensorSpec("shift", (1, 24))
    stage = Stage("toy", Toy().eval(), tensors, (TensorSpec("y", (1, 9, 7)), TensorSpec("h", (1, 9, 24))))
    return stage, trace(stage)
