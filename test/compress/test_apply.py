"""Whole recipes on a tiny policy: rescaling changes nothing, every layer gets what its step says, and errors fall."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tiny_subject import Subject, make_observations

from vla_edge.compress import apply
from vla_edge.compress.apply import compress_policy
from vla_edge.compress.calibrate import CalibrationError
from vla_edge.compress.fold import InputGroup, input_groups, rescale
from vla_edge.compress.plan import plan_layers
from vla_edge.compress.recipe import RecipeError, load_recipe, recipe_directory
from vla_edge.engine.export import as_it_is


def quantize(**options):
    return {"quantize": {"targets": ["*"], **options}}


def test_every_layer_is_in_one_group_and_rescaling_any_of_them_changes_nothing(subject):
    groups = input_groups(subject.modules, subject.stages)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(subject.modules) and len(set(names)) == len(names)
    scalable = [group for group in groups if group.producer is not None]
    assert len(scalable) >= 8
    before, rng = subject.chunks(), np.random.default_rng(0)
    weights = {name: module.weight.detach().numpy().copy() for name, module in subject.modules.items()}
    for group in scalable:
        width = subject.modules[group.names[0]].in_features
        rescale(group, subject.modules, rng.uniform(0.2, 5.0, width))
    changed = [name for group in scalable for name in group.names]
    assert all((weights[name] != subject.modules[name].weight.detach().numpy()).any() for name in changed)
    np.testing.assert_allclose(subject.chunks(), before, atol=2e-5)


def test_a_scale_that_cannot_be_is_refused(subject):
    alone = InputGroup(("vision.connector",))
    with pytest.raises(ValueError, match="cannot be rescaled"):
        rescale(alone, subject.modules, np.ones(4))
    group = next(g for g in input_groups(subject.modules, subject.stages) if g.producer is not None)
    with pytest.raises(ValueError, match="cannot be rescaled"):
        rescale(group, subject.modules, np.zeros(subject.modules[group.names[0]].in_features))


def output_error(subject, layers) -> float:
    """Of the chunks, with the layers' weights in place of the policy's."""
    import torch

    before = subject.chunks()
    with torch.no_grad():
        for name, layer in layers.items():
            module = subject.modules[name]
            module.weight.copy_(torch.from_numpy(np.array(layer.effective_weight())))
            if layer.bias is not None:
                module.bias = torch.nn.Parameter(torch.from_numpy(np.array(layer.bias, np.float32)))
    return float(np.abs(subject.chunks() - before).mean())


@pytest.mark.parametrize("method", ("awq", "gptq"))
def test_methods_that_look_at_data_lose_less_than_rounding(loaded, method):
    """Where channels differ as those of trained networks do; random ones are all alike."""
    import torch

    policy, rng = copy.deepcopy(loaded[0]), np.random.default_rng(0)
    with torch.no_grad():
        for module in policy.modules():
            if "Norm" in type(module).__name__:
                module.weight.mul_(torch.from_numpy(np.exp(rng.normal(size=module.weight.shape)).astype(np.float32)))
    errors = {}
    for name in ("rtn", method):
        subject = Subject(copy.deepcopy(policy), loaded[1])
        errors[name] = output_error(subject, subject.compress(quantize(weights="int4", group_size=32, method=name)))
    assert errors[method] < 0.95 * errors["rtn"], errors


@pytest.mark.parametrize("method", ("awq", "gptq"))
def test_what_does_not_fit_into_memory_at_once_is_recorded_in_several_passes(loaded, method, monkeypatch):
    subject, passes = Subject(copy.deepcopy(loaded[0]), loaded[1]), []
    step = quantize(weights="int4", group_size=32, method=method)
    whole = subject.compress(step)
    monkeypatch.setattr(apply, "products_bytes", lambda modules: 20_000)
    watch = apply.watch_inputs
    monkeypatch.setattr(apply, "watch_inputs", lambda *a, **k: passes.append(len(a[1])) or watch(*a, **k))
    again = Subject(copy.deepcopy(loaded[0]), loaded[1])
    parts = again.compress(step)
    assert len(passes) > 2
    for name, layer in whole.items():
        error = np.abs(parts[name].effective_weight() - layer.effective_weight()).mean()
        # what comes is the same up to rounding in float32, which tips a value over here and there
        assert error < 0.02 * np.abs(layer.effective_weight()).mean(), name
    assert abs(output_error(again, parts) / output_error(subject, whole) - 1) < 0.1


def test_corrected_biases_restore_the_mean_output(subject):
    plain = subject.compress(quantize(weights="int4", group_size=32))
    corrected = subject.compress(quantize(weights="int4", group_size=32, correct_bias=True))
    assert all(layer.bias is not None for layer in corrected.values())
    assert any(layer.bias is None for layer in plain.values())
    name = "denoise.action_out"
    seen = []
    module = subject.modules[name]
    handle = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().flatten(0, -2).numpy()))
    for observation in make_observations(6):
        subject.runner.infer(observation)
    handle.remove()
    x = np.concatenate(seen)
    want = x @ module.weight.detach().numpy().T + module.bias.detach().numpy()

    def mean_error(layer):
        return np.abs((x @ layer.effective_weight().T + layer.bias - want).mean(0)).max()

    assert mean_error(corrected[name]) < 1e-5 < mean_error(plain[name])


def test_smoothing_moves_the_policy_and_keeps_what_it_computes(subject):
    before = subject.chunks()
    layers = subject.compress({"smooth": {"targets": ["*"]}}, quantize(weights="int8", activations="int8"))
    np.testing.assert_allclose(subject.chunks(), before, atol=2e-5)
    assert all(layer.activation.kind == "static" for layer in layers.values())


def test_ranges_from_the_first_pass_are_those_of_a_second(subject, loaded):
    smooth = {"smooth": {"targets": ["*"], "at_run_time": True}}
    once = subject.compress(smooth, quantize(weights="int8", activations="int8"))
    again = Subject(copy.deepcopy(loaded[0]), loaded[1]).compress(
        smooth, quantize(weights="int8", activations="int8", calibrator="percentile", percentile=100)
    )
    for name, layer in once.items():
        # percentiles are read off a histogram: to the width of a bin
        assert layer.activation.scale == pytest.approx(again[name].activation.scale, rel=2e-3), name


@pytest.mark.parametrize("steps", [
    [{"smooth": {"targets": ["*"], "at_run_time": True}}, quantize(weights="int8", activations="int8")],
    [quantize(weights="int4", group_size=32, method="awq", at_run_time=True)],
], ids=["smooth", "awq"])  # fmt: skip
def test_inputs_that_cannot_be_rescaled_before_are_multiplied_when_they_come(subject, loaded, steps):
    from vla_edge.compress.fake import installed

    layers = subject.compress(*steps)
    scaled = {name for name, layer in layers.items() if layer.input_scale is not None}
    folded = {name for group in input_groups(subject.modules, subject.stages) if group.producer for name in group.names}
    assert scaled and not scaled & folded and any("mlp.down" in name for name in scaled)
    before = Subject(copy.deepcopy(loaded[0]), loaded[1]).chunks()
    with installed(subject.modules, layers):
        assert np.abs(subject.chunks() - before).mean() < 0.05 * np.abs(before).mean()


def test_a_layer_that_was_given_stays_as_it_is_where_another_would_be_scaled_into_it(subject):
    made = {id(module): name for name, module in subject.modules.items()}
    group = next(g for g in input_groups(subject.modules, subject.stages) if id(g.producer) in made)
    name = made[id(group.producer)]
    given = {name: as_it_is(subject.modules[name])}
    layers = subject.compress(quantize(weights="int4", group_size=16, method="awq"), given=given)
    assert layers[name] is given[name]
    np.testing.assert_array_equal(subject.modules[name].weight.detach().numpy(), given[name].weight)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"smooth": {"targets": ["vision"]}}, {"keep": {"targets": ["*"]}}], "not quantized"),
        ([{"smooth": {"targets": ["*"]}}, quantize(weights="int4", group_size=32, method="awq")], "drop one"),
        ([{"smooth": {"targets": ["*"]}}, {"smooth": {"targets": ["vision"]}}, quantize()], "disjoint"),
        ([{"smooth": {"targets": ["visoin"]}}, quantize()], "did you mean"),
    ],
)
def test_smoothing_that_contradicts_the_rest_is_an_error(subject, steps, said):
    with pytest.raises(RecipeError, match=said):
        subject.compress(*steps)


def test_no_data_for_a_method_that_needs_them_is_an_error(subject):
    with pytest.raises(CalibrationError, match="never reached"):
        subject.compress(quantize(weights="int4", group_size=32, method="gptq"), observations=0)


@pytest.mark.parametrize("file", sorted(recipe_directory().glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_applies_to_every_layer(loaded, file):
    policy, checkpoint = loaded
    recipe = load_recipe(file.stem)
    subject = Subject(copy.deepcopy(policy) if recipe.changes_policy else policy, checkpoint)
    plan, seen = plan_layers(recipe, list(subject.modules)), make_observations(4)
    layers = compress_policy(
        recipe, plan, subject.modules, subject.stages, subject.runner, seen, lambda *_: None,
        weighed=subject.weighed(seen),
    )  # fmt: skip
    assert set(layers) == set(subject.modules)
    assert recipe.description and recipe.name == file.stem
