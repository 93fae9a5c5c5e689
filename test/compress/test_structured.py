"""Heads and channels are taken out with everything that depends on them, and what stays makes up for them."""

from __future__ import annotations

import numpy as np
import torch
from tiny_subject import make_observations
from torch import nn

from vla_edge.compress.calibrate import watch_inputs
from vla_edge.compress.prune.structured import shrink
from vla_edge.compress.statistics import InputStatistics
from vla_edge.engine.runner import Runner
from vla_edge.policy.blocks import MLP, Units, units_in


def statistics_of(subject, units) -> dict:
    readers = {
        name: m for name, m in subject.modules.items() if any(m is layer for u in units for layer, _ in u.readers)
    }
    seen = watch_inputs(subject.runner, readers, lambda _: InputStatistics(), make_observations(6))
    return {id(readers[name]): statistics for name, statistics in seen.items()}


def test_units_name_every_output_and_input_of_their_layers(subject):
    units = units_in(subject.policy)
    assert {unit.kind for unit in units} == {"channels", "heads"}
    for unit in units:
        for layer, width in unit.makers:
            assert layer.out_features == unit.count * width
        for layer, width in unit.readers:
            assert layer.in_features == unit.count * width
    read = [id(layer) for unit in units for layer, _ in unit.readers]
    made = [id(layer) for unit in units for layer, _ in unit.makers]
    assert len(set(read)) == len(read) and len(set(made)) == len(made)


def test_units_that_say_nothing_can_go_without_a_trace(subject):
    """The dependencies are right: with the least half of every block silenced, taking it out changes nothing."""
    units = units_in(subject.policy)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for unit in units:
            silent = rng.permutation(unit.count)[: unit.count // 2]
            for layer, width in unit.readers:
                for i in silent:
                    layer.weight[:, i * width : (i + 1) * width] = 0
    before = subject.chunks()
    sizes = sum(m.weight.numel() for m in subject.modules.values())
    gone = shrink(units, {"channels": 0.5, "heads": 0.5}, statistics_of(subject, units))
    assert gone["channels"] > 50 and gone["heads"] >= 3
    assert sum(m.weight.numel() for m in subject.modules.values()) < 0.75 * sizes
    subject.runner = Runner.from_policy(subject.policy, subject.checkpoint)
    # damping of the refit is all that is seen
    np.testing.assert_allclose(subject.chunks(), before, atol=2e-3)


def test_what_stays_is_refitted_by_least_squares():
    torch.manual_seed(0)
    block = MLP(12, 32)
    x = torch.randn(4000, 12)
    hidden = nn.functional.gelu(block.up(x), approximate="tanh").detach().numpy()
    want = (hidden @ block.down.weight.detach().numpy().T).astype(np.float64)
    seen = InputStatistics()
    seen.update(hidden)
    (unit,) = units_in(block)
    kept_up = block.up.weight.detach().numpy().copy()
    shrink([unit], {"channels": 0.25}, {id(block.down): seen})
    assert (block.up.out_features, block.down.in_features) == (24, 24) == block.down.weight.shape[1:] * 2
    rows = [int(np.flatnonzero((kept_up == row).all(1))[0]) for row in block.up.weight.detach().numpy()]
    best = np.linalg.lstsq(hidden[:, rows].astype(np.float64), want, rcond=None)[0]
    ours = np.square(hidden[:, rows] @ block.down.weight.detach().numpy().T - want).mean()
    assert ours < 1.05 * np.square(hidden[:, rows] @ best - want).mean()


def test_one_unit_always_stays():
    layer = nn.Linear(4, 4)
    seen = InputStatistics()
    seen.update(np.random.default_rng(0).normal(size=(50, 4)))
    reader = nn.Linear(4, 2)
    shrink([Units("channels", 4, ((layer, 1),), ((reader, 1),))], {"channels": 0.99}, {id(reader): seen})
    assert layer.out_features == reader.in_features == 1
