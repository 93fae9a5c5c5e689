"""Pruning: exactly as many zeros as asked, where the method's paper puts them, and zeros that survive the export."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from tiny_subject import COLUMNS, ROWS

from vla_edge.compress.prune.masks import FOUR, keep_largest, magnitude_mask, wanda_mask
from vla_edge.compress.prune.sparsegpt import sparsegpt
from vla_edge.compress.quantize.formats import INT4
from vla_edge.compress.quantize.gptq import BLOCK, gptq
from vla_edge.compress.recipe import RecipeError
from vla_edge.compress.statistics import output_error
from vla_edge.engine.export import export_stage


def two_of_four(matrix: np.ndarray) -> bool:
    """Whether every four neighbouring inputs have exactly two zeros."""
    return bool(((matrix != 0).reshape(-1, 4).sum(1) == 2).all())


def test_magnitude_takes_the_smallest_of_the_whole_matrix(weight):
    keep = magnitude_mask(weight, 0.3)
    assert (~keep).sum() == round(0.3 * weight.size)
    assert np.abs(weight[~keep]).max() <= np.abs(weight[keep]).min()


def test_wanda_takes_the_least_product_of_weight_and_input_norm_in_each_output(weight, statistics, inputs):
    keep = wanda_mask(weight, statistics, 0.5)
    assert ((~keep).sum(1) == COLUMNS // 2).all()
    score = np.abs(weight) * np.linalg.norm(inputs.astype(np.float64), axis=0)
    for row in range(ROWS):
        assert score[row, ~keep[row]].max() <= score[row, keep[row]].min() * (1 + 1e-4)


@pytest.mark.parametrize("pattern", (False, True), ids=["unstructured", "2:4"])
def test_the_more_a_method_knows_the_less_the_output_errs(weight, statistics, pattern):
    moment = statistics.second_moment
    pruned = {
        "magnitude": weight * magnitude_mask(weight, 0.5, pattern),
        "wanda": weight * wanda_mask(weight, statistics, 0.5, pattern),
        "sparsegpt": sparsegpt(weight, moment, 0.5, pattern),
    }
    for matrix in pruned.values():
        assert np.isclose((matrix == 0).mean(), 0.5, atol=1e-3)
        assert not pattern or two_of_four(matrix)
    errors = {name: output_error(matrix - weight, moment) for name, matrix in pruned.items()}
    assert errors["sparsegpt"] < 0.85 * errors["wanda"] < 0.1 * errors["magnitude"], errors


def test_sparsegpt_gives_what_stays_the_least_squares_correction_by_the_book(statistics):
    """One weight of each row goes: the rest must then be the least-squares answer on the inputs yet to come."""
    columns = 6
    moment = statistics.second_moment[:columns, :columns].astype(np.float64)
    moment += 0.01 * np.diag(moment).mean() * np.eye(columns)
    row = np.array([[1e-4, 1.0, 1.0, 1.0, 1.0, 1.0]], np.float32)  # the first goes, whatever the score
    found = sparsegpt(row, statistics.second_moment[:columns, :columns], 1 / columns)
    inverse = np.linalg.inv(moment)
    np.testing.assert_allclose(found[0], row[0] - row[0, 0] / inverse[0, 0] * inverse[0], atol=1e-6)


@pytest.mark.parametrize("pattern", (False, True), ids=["unstructured", "2:4"])
def test_sparsegpt_by_the_book(pattern):
    """Against the paper's own equations over more than one block: each weight that goes is made up for by those to come,
    w -= w_i / H^-1_ii * H^-1_i with the inverse of what is left, and w_i^2 / H^-1_ii is what it costs."""
    rows, columns, rng = 5, 2 * BLOCK + 8, np.random.default_rng(0)
    inputs = rng.normal(size=(4000, 24)) @ rng.normal(size=(24, columns)) + rng.normal(size=(4000, columns))
    moment, weight = (inputs.T @ inputs / 4000).astype(np.float32), rng.normal(size=(rows, columns)).astype(np.float32)
    left, book = weight.astype(np.float64), np.empty((rows, columns))
    damped = moment + 0.01 * np.diag(moment).mean() * np.eye(columns)
    costs = [np.linalg.inv(damped[i:, i:])[0] for i in range(columns)]  # of the first of those that are left
    together = FOUR if pattern else BLOCK
    for i in range(columns):
        if i % together == 0:
            some = np.arange(i, min(i + together, columns))
            cost = left[:, some] ** 2 / [costs[j][0] for j in some]
            keep = keep_largest(cost if pattern else cost.reshape(1, -1), 0.5, pattern, by_row=False).reshape(rows, -1)
        book[:, i] = np.where(keep[:, i % together], left[:, i], 0.0)
        left[:, i:] -= (left[:, i] - book[:, i])[:, None] / costs[i][0] * costs[i]
    found = sparsegpt(weight, moment, 0.5, pattern)
    np.testing.assert_array_equal(found == 0, book == 0)
    np.testing.assert_allclose(found, book, atol=1e-5)


def test_gptq_keeps_the_zeros(weight, statistics):
    pruned = sparsegpt(weight, statistics.second_moment, 0.5, True)
    found = gptq(pruned, statistics.second_moment, INT4, 32, keep=pruned != 0)
    assert not found.values[pruned == 0].any()


def test_fours_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="in fours"):
        keep_largest(np.ones((3, 6)), 0.5, True, True)


@pytest.mark.parametrize("storage", [
    {"keep": {"targets": ["*"], "dtype": "float16"}},
    {"quantize": {"targets": ["*"], "weights": "int4", "group_size": 32, "method": "gptq"}},
    {"quantize": {"targets": ["*"], "weights": "int8", "method": "awq"}},
], ids=["float16", "int4", "int8"])  # fmt: skip
def test_two_of_four_are_two_of_four_in_the_exported_file(subject, tmp_path, storage):
    targets = [name for name, module in subject.modules.items() if module.in_features % 4 == 0]
    layers = subject.compress({"prune": {"targets": targets, "method": "sparsegpt", "pattern": "2:4"}}, storage)
    assert len(targets) > 10
    for stage in subject.stages:
        mine = {name.partition(".")[2]: layer for name, layer in layers.items() if name.startswith(f"{stage.name}.")}
        model = onnx.load(export_stage(stage, mine, tmp_path / f"{stage.name}.onnx"))
        stored = {c.name: onnx.numpy_helper.to_array(c).astype(np.float32) for c in model.graph.initializer}
        for name in mine:
            if f"{stage.name}.{name}" in targets:
                zeros = (stored[f"{name}.weight"].T == 0).reshape(-1, 4).sum(1)
                # rounding may add zeros, and never takes one
                assert zeros.min() >= 2 and layers[f"{stage.name}.{name}"].describe()["sparsity"] >= 0.5
                assert "keep" not in storage or (zeros == 2).all()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"prune": {"targets": ["*"], "method": "wanda", "sparsity": 1.0}}], "below 1"),
        ([{"prune": {"targets": ["*"], "pattern": "2:4", "sparsity": 0.3}}], "0.5 for 2:4"),
        ([{"prune": {"targets": ["*"], "pattern": "1:4"}}], "pattern is"),
        ([{"prune": {"targets": ["*"]}}, {"prune": {"targets": ["vision"]}}], "disjoint"),
        ([{"prune": {"targets": ["*"]}}, {"lowrank": {"targets": ["vision"], "rank": 2}}], "drop one"),
        ([{"lowrank": {"targets": ["*"]}}], "one of energy and rank"),
        ([{"lowrank": {"targets": ["vision"], "rank": 2}}, {"keep": {"targets": ["*"]}}], "keeps; drop one"),
    ],
)
def test_steps_that_contradict_each_other_are_errors(subject, steps, said):
    with pytest.raises(RecipeError, match=said):
        subject.compress(*steps)


def test_a_layer_without_fours_is_named_before_any_work(subject, monkeypatch):
    from torch import nn

    subject.modules["vision.connector"] = nn.Linear(6, 4)
    monkeypatch.setattr(subject, "runner", None)
    with pytest.raises(RecipeError, match="vision.connector to 2:4, and its 6 inputs"):
        subject.compress({"prune": {"targets": ["vision"], "pattern": "2:4"}})
