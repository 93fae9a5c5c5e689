"""Recipes that factor convolutions: what pays takes their place, and is trained, pruned and rounded like any other layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vla_edge.compress.calibrate import collect
from vla_edge.compress.factor.replace import WORTH, factorable
from vla_edge.compress.fake import installed
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.quantize.weights import QuantizedWeight
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.piecewise import obstacle
from vla_edge.engine.precision import layer_precisions
from vla_edge.engine.runner import Runner
from vla_edge.engine.trace import policy_layers
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity" / "baselines"
BLOCK = "vision.backbone.blocks.5"
SECOND = f"{BLOCK}.second.convolution.linear"


def observation(spec, index: int) -> Observation:
    rng = np.random.default_rng(index)
    frames = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), np.uint8) for c in spec.cameras}
    joints = JointState(0, spec.joint_names, rng.normal(0, 0.3, len(spec.joint_names)))
    return Observation(200_000_000 * index, frames, joints, "")


class Case:
    """A policy that LeRobot has saved, and observations for it."""

    def __init__(self, name: str):
        self.checkpoint = load_checkpoint(SAVED / name / "checkpoint")
        self.policy = load_policy(self.checkpoint)
        seen = [observation(self.checkpoint.spec, index) for index in range(12)]
        self.data = collect(seen, "random observations", frames=6, held_out=3)

    def run(self, *steps, **options):
        recipe = parse_recipe({"name": "test", "steps": list(steps)})
        return carry_out(recipe, self.policy, self.checkpoint, self.data, lambda *_: None, **options)

    def error(self, done, seen=None) -> float:
        """Mean absolute difference of the chunks to those of the policy as it was, rad; on what was held out, or `seen`."""
        ours, theirs = (Runner.from_policy(policy, self.checkpoint) for policy in (done.policy, self.policy))
        seen = self.data.held_out if seen is None else seen
        with installed(policy_layers(done.policy.stages()), done.layers):
            found = [ours.infer(one, seed=3).chunk.positions for one in seen]
        return float(np.abs(np.subtract(found, [theirs.infer(one, seed=3).chunk.positions for one in seen])).mean())


@pytest.fixture(scope="module")
def act() -> Case:
    return Case("act")


def lowrank(targets: str = BLOCK, method: str = "tucker", **options) -> dict:
    options = {"rank": 8, **options} if "energy" not in options else options
    return {"lowrank": {"targets": [targets], "method": method, "separate": "smaller", **options}}


@pytest.mark.parametrize("method, parts", [("svd", (0, 1)), ("tucker", (0, 1, 2)), ("cp", (0, 3))])
def test_factors_take_the_place_of_what_a_step_means_and_of_nothing_else(act, method, parts):
    before = dict(policy_layers(act.policy.stages()))
    done = act.run(lowrank(method=method, separate="faster"))
    assert list(done.factored) == [f"{BLOCK}.first.convolution.linear", SECOND]
    assert all(layer.separate and 0 < layer.energy < 1 for layer in done.factored.values())
    wanted = []
    for name in before:
        wanted += [f"{name}.{part}.linear" for part in parts] if name in done.factored else [name]
    assert list(done.layers) == wanted
    assert policy_layers(act.policy.stages()).keys() == before.keys(), "the policy itself stays"
    assert 0 < act.error(done) < 0.1


def test_more_energy_errs_less_at_the_actions(act):
    errors = [act.error(act.run(lowrank("vision", energy=energy))) for energy in (0.99, 0.9)]
    assert errors[0] < 0.5 * errors[1]


def test_report_says_what_each_layer_got(act):
    row = act.run(lowrank()).factored[SECOND].to_dict()
    assert json.loads(json.dumps(row)) == row
    assert row["method"] == "tucker" and row["ranks"] == [8, 8] and row["separate"] and row["time"] is None
    assert row["error"] == pytest.approx(np.sqrt(1 - row["energy"]), abs=1e-4)
    assert row["numbers"] == row["multiplications"] == pytest.approx((32 * 8 + 9 * 8 * 8 + 8 * 32) / (9 * 32 * 32), abs=1e-5)


def test_only_what_was_measured_to_be_faster_is_separate_and_the_rest_is_as_it_was(act):
    asked = []

    def race(convolution, factors, size, storage):
        asked.append((convolution.linear.out_features, size, storage.key, len(factors.linear)))
        return WORTH - 0.01 if len(asked) == 1 else WORTH

    step = {**lowrank()["lowrank"], "separate": "faster"}
    done = act.run({"lowrank": step}, {"quantize": {"targets": ["vision"], "weights": "int8"}}, race=race)
    assert [entry[0] for entry in asked] == [32, 32] and {entry[2] for entry in asked} == {"quantize"}
    assert all(len(entry[1]) == 2 and entry[3] == 3 for entry in asked)
    first, second = done.factored.values()
    assert (first.separate, second.separate) == (True, False) and second.time == WORTH and second.ranks == (8, 8)
    assert SECOND in done.layers
    plain = act.run({"quantize": {"targets": ["vision"], "weights": "int8"}})
    np.testing.assert_array_equal(done.layers[SECOND].weight.values, plain.layers[SECOND].weight.values)


def test_factors_are_pruned_and_rounded_inputs_too(act):
    int8 = {"quantize": {"targets": ["vision"], "weights": "int8", "activations": "int8"}}
    done = act.run(lowrank("vision"), {"prune": {"targets": [SECOND], "sparsity": 0.25}}, int8)
    layers = {name: layer for name, layer in done.layers.items() if name.startswith(f"{SECOND}.")}
    assert len(layers) == 3
    for layer in layers.values():
        assert isinstance(layer.weight, QuantizedWeight) and layer.activation.kind == "static" and layer.sparsity >= 0.25
    exact, rounded = act.error(act.run(lowrank("vision"))), act.error(act.run(lowrank("vision"), int8))
    assert rounded < 1.5 * exact, "rounding adds little to what factors cost"


def test_factors_can_be_kept_in_half_precision(act):
    done = act.run(lowrank(), {"keep": {"targets": ["vision"], "dtype": "float16"}})
    assert {done.layers[f"{SECOND}.{part}.linear"].precision for part in range(3)} == {"float16"}


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_convolutions_over_time_are_factored_too(method):
    case = Case("diffusion_ddim")
    done = case.run(lowrank("denoise", method, rank=4))
    assert len(done.factored) > 5 and any(layer.separate for layer in done.factored.values())
    assert 0 < case.error(done) < 0.5


def test_training_mends_what_factors_cost(act, tmp_path):
    train = {"finetune": {"steps": 40, "batch": 6, "rate": 1e-3}}
    broken, mended = act.run(lowrank("vision")), act.run(lowrank("vision"), train, work=tmp_path)
    seen = act.data.observations  # too few to tell anything of others
    assert act.error(mended, seen) < 0.8 * act.error(broken, seen)
    assert mended.layers.keys() == broken.layers.keys()


def test_an_interrupted_training_keeps_what_was_measured(act, tmp_path):
    class Stop(Exception):
        pass

    def stop(fraction, what):
        if what.startswith("training"):
            raise Stop

    recipe = [{"lowrank": {**lowrank()["lowrank"], "separate": "faster"}}, {"finetune": {"steps": 2, "batch": 2}}]
    times = iter([0.5, 2.0])
    parsed = parse_recipe({"name": "test", "steps": recipe})
    with pytest.raises(Stop):
        carry_out(parsed, act.policy, act.checkpoint, act.data, stop, work=tmp_path, race=lambda *_: next(times))
    done = act.run(*recipe, work=tmp_path, race=lambda *_: pytest.fail("measured again"))
    assert [layer.separate for layer in done.factored.values()] == [True, False]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([lowrank("act")], r"step 1 \(lowrank\): method tucker is for convolutions of more than one tap, and its targets hold none"),
        ([lowrank("vision.backbone.blocks.2.shortcut", "cp")], "method cp is for convolutions of more than one tap"),
        ([lowrank("vision.no_such")], "matches no layer"),
        ([lowrank(), lowrank("vision", "cp")], "as another step does; make their targets disjoint"),
        ([{"lowrank": {"targets": [BLOCK], "rank": 2}}, lowrank()], "put it first|as another step does"),
        ([{"quantize": {"targets": ["*"]}}, lowrank()], "changes the shapes that earlier steps work on; put it first"),
        ([{"prune": {"targets": ["*"]}}, lowrank()], "put it first"),
        ([lowrank(), {"shrink": {"targets": ["*"], "channels": 0.5}}], "put it first"),
        ([lowrank(method="svd2")], "method is 'svd2', allowed is svd, tucker, cp"),
        ([lowrank(rank="vbmf", method="cp")], "vbmf goes with method tucker"),
        ([lowrank(rank="many")], "a positive whole number, or vbmf for tucker"),
        ([lowrank(dtype="float16")], "a keep step stores those of convolutions in 16 bits"),
        ([lowrank("act", "svd", separate="faster")], "method svd is for convolutions of more than one tap, and its targets"),
        ([lowrank(separate="always")], "separate is 'always', allowed is null, smaller, faster"),
    ],
)
def test_what_cannot_be_carried_out_is_an_error_before_any_work(act, steps, said, monkeypatch, tmp_path):
    monkeypatch.setattr(Runner, "infer", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(RecipeError, match=said):
        act.run(*steps, work=tmp_path)


def test_what_shapes_alone_or_a_piece_alone_do_not_tell_is_refused():
    recipe = parse_recipe({"name": "test", "steps": [lowrank("*")]})
    with pytest.raises(RecipeError, match="which shapes do not tell; leave that step out to plan with"):
        layer_precisions(recipe, {SECOND: (288, 32)})
    assert "works on the whole policy at once" in obstacle(recipe.steps[0])


def test_a_policy_without_convolutions_is_told_so(subject):
    recipe = parse_recipe({"name": "test", "steps": [lowrank("vision")]})
    assert not factorable(subject.stages)
    with pytest.raises(RecipeError, match=r"this policy has none\); take method svd where smaller"):
        carry_out(recipe, subject.policy, subject.checkpoint, None, lambda *_: None)
