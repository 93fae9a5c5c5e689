"""Factors: the best there are for the data, and only where they are fewer numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tiny_subject import Subject, load_tiny

from vla_edge.compress.low_rank import factorize, saves
from vla_edge.compress.statistics import output_error


def test_without_data_it_is_the_truncated_svd(weight):
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    found = factorize(weight, 7)
    np.testing.assert_allclose(found.dequantize(), (left[:, :7] * values[:7]) @ right[:7], atol=1e-5)


def test_with_data_no_factors_of_that_rank_err_less(weight, statistics):
    moment = statistics.second_moment
    ours = output_error(factorize(weight, 7, second_moment=moment).dequantize() - weight, moment)
    blind = output_error(factorize(weight, 7).dequantize() - weight, moment)
    assert ours < 0.5 * blind
    # the least that is possible: the energy of the whitened matrix beyond rank 7
    root = np.linalg.cholesky(moment.astype(np.float64) + 1e-9 * np.eye(len(moment)))
    rest = np.linalg.svd(weight @ root, compute_uv=False)[7:]
    assert ours == pytest.approx((rest**2).sum(), rel=0.05)


def test_energy_keeps_its_share(weight):
    values = np.linalg.svd(weight, compute_uv=False) ** 2
    found = factorize(weight, energy=0.9)
    assert values[: found.rank].sum() >= 0.9 * values.sum() > values[: found.rank - 1].sum()
    assert factorize(weight, energy=1.0).rank == min(weight.shape)
    assert factorize(np.zeros((4, 6), np.float32), energy=0.5).rank >= 1


def test_what_factors_do_not_save_stays_whole(tmp_path):
    policy, checkpoint = load_tiny(tmp_path)
    subject = Subject(copy.deepcopy(policy), checkpoint)
    layers = subject.compress({"lowrank": {"targets": ["*"], "rank": 8}})
    kinds = {name: layer.weight is None for name, layer in layers.items()}
    assert any(kinds.values()) and not all(kinds.values())
    for name, factored in kinds.items():
        assert factored == saves(layers[name].shape, min(8, *layers[name].shape)), name


def test_a_branch_takes_over_what_rounds_worst(tmp_path):
    policy, checkpoint = load_tiny(tmp_path)
    moved = {}
    for rank in (0, 4):
        subject = Subject(copy.deepcopy(policy), checkpoint)
        step = {"targets": ["*"], "weights": "int4", "group_size": 32, "activations": "int4-dynamic", "low_rank": rank}
        layers = subject.compress({"quantize": step})
        weights = {name: module.weight.detach().numpy() for name, module in subject.modules.items()}
        moved[rank] = np.mean([np.square(layers[n].effective_weight() - weights[n]).mean() for n in layers])
        assert all(layer.describe().get("rank", 0) == min(rank, *layer.shape) for layer in layers.values())
    assert moved[4] < 0.98 * moved[0]
