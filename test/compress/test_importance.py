"""What counts is what moves the action chunk."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_subject import Subject, make_observations

from vla_edge.compress import importance
from vla_edge.compress.calibrate import CalibrationError
from vla_edge.compress.importance import weighed_inputs
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.compress.sensitivity import Trial
from vla_edge.compress.statistics import InputStatistics
from vla_edge.learn.frames import from_observations
from vla_edge.learn.losses import euler_path


@pytest.fixture(scope="module")
def subject(loaded):
    return Subject(copy.deepcopy(loaded[0]), loaded[1])


def groups_of(subject, *names) -> dict:
    return {name: [subject.modules[name]] for name in names}


def test_weights_change_the_products_alone():
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(40, 3)).astype(np.float32), rng.uniform(0, 2, 40).astype(np.float32)
    plain, weighed, part = InputStatistics(), InputStatistics(), InputStatistics()
    plain.update(rows)
    weighed.update(rows, weights)
    part.update(rows[:10], weights[:10])
    part.update(rows[10:].reshape(5, 6, 3), weights[10:].reshape(5, 6))
    wanted = (rows * weights[:, None]).T @ rows / weights.sum()
    for statistics in (weighed, part):
        np.testing.assert_allclose(statistics.second_moment, wanted, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(statistics.mean, plain.mean, atol=1e-6)
    factor = np.float32([1, 2, 3])
    np.testing.assert_allclose(
        weighed.scaled(factor).second_moment, wanted * np.outer(factor, factor), rtol=1e-4, atol=1e-6
    )


@pytest.fixture
def recorded(monkeypatch):
    """(vectors, weights) of the last update."""
    seen = {}

    class Recorded(InputStatistics):
        def update(self, values, weights=None):
            seen.update(values=values, weights=weights)
            super().update(values, weights)

    monkeypatch.setattr(importance, "InputStatistics", Recorded)
    return seen


def test_a_vector_weighs_what_its_output_moves_the_chunk_by(subject, recorded):
    name = "prefix.layers.0.mlp.down"
    observations = make_observations(1)
    weighed_inputs(subject.policy, subject.checkpoint, groups_of(subject, name), observations)
    slopes = slopes_by_differences(subject, subject.modules[name], observations, len(recorded["weights"]))
    np.testing.assert_allclose(recorded["weights"], slopes / slopes.mean(), rtol=1e-3, atol=1e-4)
    assert recorded["weights"].max() > 2 * np.median(recorded["weights"])


def slopes_by_differences(subject, module, observations, vectors: int) -> np.ndarray:
    """Norm of the gradient at each of a layer's output vectors, of the chunk along the direction that is looked at."""
    policy, spec = copy.deepcopy(subject.policy).double(), subject.checkpoint.spec
    module = dict(zip(subject.policy.modules(), policy.modules()))[module]
    for reads in (policy.vision, *policy.time.modules()):
        reads.register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))
    frames = from_observations(observations, spec, subject.checkpoint.tokenizer_path)
    frames = replace(frames, state=frames.state.double())
    generator = torch.Generator().manual_seed(importance.SEED)
    shape = (1, policy.config.chunk_size, spec.max_action_dim)
    noise = torch.randn(shape, generator=generator).double()
    joints = len(spec.joint_names)
    direction = (torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0)[..., :joints].numpy()
    step, moved = 1e-4, {}

    def value(vector: int, channel: int, by: float) -> float:
        moved.update(at=(vector, channel), by=by)
        with torch.no_grad():
            cache, _ = frames.shown_to(policy)
            *_, chunk = euler_path(policy, noise, cache, spec.num_steps)
        return float((spec.action.unnormalize(chunk[..., :joints].numpy()) * direction).sum())

    def move(_module, _inputs, output):
        output = output.clone()
        output.view(vectors, -1)[moved["at"]] += moved["by"]
        return output

    module.register_forward_hook(move)
    slopes = [[value(i, j, step) - value(i, j, -step) for j in range(module.out_features)] for i in range(vectors)]
    return np.linalg.norm(slopes, axis=1)


def test_words_that_are_not_there_weigh_nothing_and_every_observation_the_same(subject, recorded):
    name = "prefix.layers.0.q"
    weighed_inputs(subject.policy, subject.checkpoint, groups_of(subject, name), make_observations(2))
    weights = recorded["weights"]
    assert (weights == 0).any() and weights.mean() == pytest.approx(1.0)


def test_it_is_the_same_again_and_leaves_the_policy_as_it_was(subject):
    parameters = list(subject.policy.parameters())
    parameters[0].requires_grad_(True)
    wanted = [parameter.requires_grad for parameter in parameters]
    before, groups = subject.chunks(), groups_of(subject, "vision.encoder.layers.0.q", "denoise.layers.0.mlp.up")
    runs = [weighed_inputs(subject.policy, subject.checkpoint, groups, make_observations(3)) for _ in range(2)]
    for name in groups:
        np.testing.assert_array_equal(runs[0][name].second_moment, runs[1][name].second_moment)
    assert [parameter.requires_grad for parameter in parameters] == wanted
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(module._forward_hooks for module in subject.modules.values())
    np.testing.assert_array_equal(subject.chunks(), before)


def test_rounding_by_importance_moves_the_robot_less(loaded):
    errors = {}
    for how in (None, "action"):
        subject = Subject(copy.deepcopy(loaded[0]), loaded[1])
        trial = Trial(subject.runner, subject.modules, make_observations(8, seed=5))
        step = {"targets": ["prefix"], "weights": "int4", "group_size": 16, "method": "gptq", "importance": how}
        layers = subject.compress(
            {"quantize": step}, {"keep": {"targets": ["vision", "time", "denoise"]}}, observations=24
        )
        errors[how] = trial.error_rad(layers)
    assert errors["action"] < 0.9 * errors[None]


def test_data_that_are_not_finite_are_an_error(loaded):
    subject = Subject(copy.deepcopy(loaded[0]), loaded[1])
    with torch.no_grad():
        subject.modules["vision.encoder.layers.0.q"].weight[0, 0] = np.nan
    with pytest.raises(CalibrationError, match="not finite"):
        weighed_inputs(
            subject.policy,
            subject.checkpoint,
            groups_of(subject, "vision.encoder.layers.0.mlp.down"),
            make_observations(1),
        )


@pytest.mark.parametrize("step", [{"method": "rtn"}, {"method": "gptq", "importance": "loss"}])
def test_importance_that_nothing_would_come_of_is_refused(step):
    step = {"targets": ["*"], "weights": "int4", "group_size": 32, "importance": "action", **step}
    with pytest.raises(RecipeError, match="importance"):
        parse_recipe({"name": "test", "steps": [{"quantize": step}]})
