"""Recipes that train: what they decided holds through the training, they go on where they were, and they help."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tiny_subject import Subject, make_observations

from vla_edge.compress.calibrate import collect
from vla_edge.compress.fake import installed
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.runner import Runner
from vla_edge.engine.trace import policy_layers

INT4 = {"quantize": {"targets": ["*"], "weights": "int4", "group_size": 32}}
SHRINK = {"shrink": {"targets": ["*"], "channels": 0.5}}


@pytest.fixture(scope="module")
def data():
    return collect(make_observations(24), "random observations", frames=16, held_out=4)


@pytest.fixture
def run(loaded, data, tmp_path):
    def carried_out(*steps, **options):
        recipe = parse_recipe({"name": "test", "steps": list(steps)})
        options = {"tell": lambda *_: None, "work": tmp_path / "work", **options}
        return carry_out(recipe, *loaded, data, **options)

    return carried_out


def error(loaded, compressed) -> float:
    """Mean absolute difference of the chunks to those of the policy it was made of, rad."""
    runner = Runner.from_policy(compressed.policy, loaded[1], compressed.num_steps)
    reference = Subject(copy.deepcopy(loaded[0]), loaded[1]).runner
    with installed(policy_layers(compressed.policy.stages()), compressed.layers):
        runner.set_num_steps(compressed.num_steps)
        ours = [runner.infer(o, seed=3).chunk.positions for o in make_observations(4, seed=9)]
    theirs = [reference.infer(o, seed=3).chunk.positions for o in make_observations(4, seed=9)]
    return float(np.abs(np.array(ours) - theirs).mean())


def train(steps: int, **options) -> dict:
    return {"finetune": {"steps": steps, "batch": 8, "rate": 1e-3, **options}}


def test_training_mends_what_pruning_broke(loaded, run):
    prune = {"prune": {"targets": ["*"], "method": "magnitude", "sparsity": 0.6}}
    broken, mended = run(prune), run(prune, train(60, rate=3e-4))
    assert error(loaded, mended) < 0.8 * error(loaded, broken)


def test_a_shrunk_policy_is_trained_in_its_new_shapes(loaded, run):
    done = run(SHRINK, train(2))
    before = {name: m.weight.shape for name, m in policy_layers(loaded[0].stages()).items()}
    after = {name: m.weight.shape for name, m in policy_layers(done.policy.stages()).items()}
    assert before.keys() == after.keys() and sum(after[name] != shape for name, shape in before.items()) > 10
    assert np.isfinite(error(loaded, done))


def test_training_through_the_rounding_stays_on_the_grid_and_helps(loaded, run):
    rounded, trained = run(INT4), run(INT4, train(40, rate=3e-4))
    assert error(loaded, trained) < 0.9 * error(loaded, rounded)
    for name, layer in trained.layers.items():
        assert layer.describe() == rounded.layers[name].describe()
        np.testing.assert_array_equal(layer.weight.scales, rounded.layers[name].weight.scales)
    assert any((l.weight.values != rounded.layers[n].weight.values).any() for n, l in trained.layers.items())


@pytest.mark.parametrize("few", [(), ({"few_steps": {"num_steps": 1, "steps": 5, "batch": 8, "rate": 0.1}},)])
def test_zeros_stay_through_training_and_rounding(loaded, run, few):
    targets = ["vision.encoder.layers", "denoise.layers"]
    done = run({"prune": {"targets": targets, "pattern": "2:4"}}, train(5), *few, INT4)
    pruned = [layer for name, layer in done.layers.items() if any(name.startswith(target) for target in targets)]
    assert len(pruned) > 5
    for layer in pruned:
        assert ((layer.weight.values.astype(int) == 0).reshape(-1, 4).sum(1) >= 2).all()


def test_few_steps_learn_where_many_lead(loaded, run):
    few = {"num_steps": 1, "batch": 16, "rate": 1e-3}
    untrained, trained = (
        run({"few_steps": {**few, "steps": steps, "rate": rate}}) for steps, rate in ((1, 1e-12), (150, 3e-4))
    )
    assert trained.num_steps == untrained.num_steps == 1
    assert error(loaded, trained) < 0.8 * error(loaded, untrained)


def test_flow_steps_are_taken_and_what_rounds_is_fitted_to_them(loaded, run):
    five, rounded = run({"flow_steps": {"num_steps": 1}}), run({"flow_steps": {"num_steps": 1}}, INT4)
    assert five.num_steps == rounded.num_steps == 1
    assert 0 < error(loaded, five) < error(loaded, rounded)
    asked = run({"flow_steps": {"evaluations": 2}})
    assert asked.num_steps == 3 and asked.evaluated in ((0, 1), (0, 2)) and not five.evaluated


def test_the_policy_itself_stays_as_it_is(loaded, run):
    before = {name: value.clone() for name, value in loaded[0].state_dict().items()}
    run(SHRINK, train(2), INT4)
    for name, value in loaded[0].state_dict().items():
        assert (value == before[name]).all(), name


def test_an_interrupted_training_goes_on_to_the_same_result(run, tmp_path):
    class Stop(Exception):
        pass

    told = []

    def stop(fraction, what):
        told.append(what.startswith("training"))
        if sum(told) == 55:
            raise Stop

    step = train(60)
    whole = run(INT4, step, work=tmp_path / "whole")
    with pytest.raises(Stop):
        run(INT4, step, tell=stop)
    resumed = []
    again = run(INT4, step, tell=lambda fraction, what: resumed.append(what))
    trained = [what for what in resumed if what.startswith("training")]
    assert len(trained) == 10, "what was saved at step 50 is not done again"
    for name, layer in whole.layers.items():
        assert (again.layers[name].weight.values != layer.weight.values).mean() < 0.01, name


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([INT4, SHRINK], "put it first"),
        ([INT4, {"few_steps": {}}], "has fixed; put it before"),
        ([INT4, {"prune": {"targets": ["*"]}}], "has fixed; put it before"),
        ([INT4, train(5), {"keep": {"targets": ["vision"]}}], "follows training through the rounding"),
        ([{"lowrank": {"targets": ["*"], "rank": 4}}, train(5)], "does not train the factors"),
        ([{"few_steps": {"num_steps": 2}}], "do not divide"),
        ([{"few_steps": {"num_steps": 1}}, train(5)], "put it before few_steps"),
        ([{"flow_steps": {"num_steps": 2}}, {"few_steps": {"num_steps": 1}}], "put it first, or drop one"),
        ([INT4, {"flow_steps": {"num_steps": 2}}], "put it first, or drop one"),
        ([{"flow_steps": {"num_steps": 2}}, {"flow_steps": {"num_steps": 1}}], "is there twice"),
        ([{"flow_steps": {"num_steps": 0}}], "num_steps is 0"),
        ([{"flow_steps": {}}], "both left out"),
        ([{"flow_steps": {"evaluations": 5}}], "at least as many"),
        ([{"shrink": {"targets": ["denoise"], "heads": 0.5}}], "cover no whole block"),
        ([{"shrink": {"targets": ["*"]}}], "all 0"),
        ([train(5, shown=1.0)], "give it demonstrations"),
        ([train(0)], "steps is 0"),
    ],
)
def test_what_cannot_be_carried_out_is_an_error_before_any_training(run, steps, said, monkeypatch):
    from vla_edge.learn import fit

    monkeypatch.setattr(fit.Fit, "update", lambda self: pytest.fail("training has begun"))
    with pytest.raises(RecipeError, match=said):
        run(*steps)
