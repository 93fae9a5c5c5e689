"""A led flow ends in the plan it was to continue, and leaves the rest to the network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import WORDS, make_observations, tiny_policy, tiny_spec

from vla_edge.engine.build import build
from vla_edge.engine.continuation import Continuation, inpaint
from vla_edge.engine.runner import Runner, RunnerError
from vla_edge.policy.checkpoint_writer import write_checkpoint
from vla_edge.policy.preprocess import Postprocessor
from vla_edge.serve.policies.real_time_chunking import soft_mask


@pytest.fixture(scope="module", params=["eager", "int8"])
def engine(request, checkpoint, bundle):
    return Runner.from_checkpoint(checkpoint) if request.param == "eager" else Runner.from_bundle(bundle, threads=1)


@pytest.fixture(scope="module")
def observation():
    return make_observations(1)[0]


def target(engine, observation):
    """The chunk of another noise, moved."""
    return engine.infer(observation, seed=7).chunk.positions + 0.1


def test_frozen_rows_are_met_exactly_and_no_weight_changes_nothing(engine, observation):
    wanted, free = target(engine, observation), engine.infer(observation).chunk.positions
    led = engine.infer(observation, continuation=Continuation(wanted, soft_mask(8, 3, 3))).chunk.positions
    np.testing.assert_allclose(led[:3], wanted[:3], atol=1e-6)
    assert np.abs(led[3:] - wanted[3:]).max() > 0.01
    unled = engine.infer(observation, continuation=Continuation(wanted, np.zeros(8))).chunk.positions
    np.testing.assert_array_equal(unled, free)


def test_led_only_at_the_end_of_the_flow_frozen_rows_are_met_all_the_same(engine, observation):
    wanted, mask = target(engine, observation), soft_mask(8, 3, 3)
    led = {
        begin: engine.infer(observation, continuation=Continuation(wanted, mask, begin)).chunk.positions
        for begin in (1.0, 0.5, 0.0)
    }
    for positions in led.values():
        np.testing.assert_allclose(positions[:3], wanted[:3], atol=1e-6)
    free = engine.infer(observation).chunk.positions
    moved = [np.abs(positions[3:] - free[3:]).max() for positions in led.values()]
    # With only the last of three steps led, nothing of the rest could still change.
    assert moved[0] > moved[2] and moved[2] < 1e-6


def test_soft_rows_come_closer_to_the_plan_the_larger_their_weight(engine, observation):
    wanted = target(engine, observation)
    distances = [
        np.abs(engine.infer(observation, continuation=Continuation(wanted, np.full(8, w))).chunk.positions - wanted).mean()
        for w in (0.0, 0.3, 0.6, 0.9, 1.0)
    ]
    assert np.all(np.diff(distances) < 0) and distances[-1] < 1e-6


def test_known_actions_travel_on_the_straight_way_from_their_noise():
    """With weight one the flow is that of rectified flow's own path, whatever the network says (float64)."""
    rng = np.random.default_rng(0)
    noise, wanted, x, steps = rng.normal(size=(1, 4, 3)), rng.normal(size=(1, 4, 3)), None, 10
    x = noise.copy()
    for index in range(steps):
        t = 1.0 - index / steps
        np.testing.assert_allclose(x, t * noise + (1.0 - t) * wanted, atol=1e-6)
        x = x - inpaint(x, rng.normal(size=x.shape), t, wanted, np.ones_like(x)) / steps
    np.testing.assert_allclose(x, wanted, atol=1e-6)


@pytest.fixture(scope="module", params=["eager", "engine"])
def prefixed(request, data, tmp_path_factory):
    """The tiny policy, as one that was trained to be given up to three rows."""
    spec, directory = replace(tiny_spec(), trained_prefix=3), tmp_path_factory.mktemp("prefixed")
    checkpoint = write_checkpoint(directory / "checkpoint", tiny_policy(), spec, WORDS)
    if request.param == "eager":
        return Runner.from_checkpoint(checkpoint)
    return Runner.from_bundle(build(checkpoint, "fp32", output=directory / "fp32", calibration=data), threads=1)


def test_rows_given_to_a_policy_trained_for_them_stand_at_time_zero_while_the_others_flow(prefixed, observation):
    """Against the same flow written out in PyTorch."""
    policy, spec = tiny_policy(), prefixed.spec
    wanted, shape = target(prefixed, observation), prefixed.noise_shape
    noise = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    for rows in (2, 0, 3):
        led = prefixed.infer(observation, noise=noise, continuation=Continuation(wanted, np.zeros(8), prefix=rows))
        inputs = dict(prefixed.stage_inputs(observation))["denoise"]
        cache = [torch.from_numpy(inputs[tensor.name]) for tensor in prefixed.stages["denoise"].interface.inputs[2:]]
        x = torch.from_numpy(noise.copy())
        given = torch.zeros(shape[1], dtype=torch.bool)
        given[:rows] = True
        own = Postprocessor(spec).inverse(wanted, observation.joints)
        x[0, :rows] = torch.from_numpy(np.pad(own, ((0, 0), (0, shape[2] - 3)))[:rows])
        with torch.no_grad():
            for step in range(prefixed.num_steps):
                moments = torch.where(given, 0.0, 1.0 - step / prefixed.num_steps)
                condition = policy.time(moments)[0][None]
                x = x - policy.denoise(x, condition, *cache)[0] * (~given)[:, None] / prefixed.num_steps
        np.testing.assert_allclose(led.chunk.positions[:rows], wanted[:rows], atol=1e-6)
        expected = Postprocessor(spec)(x.numpy(), observation.joints)
        np.testing.assert_allclose(led.chunk.positions, expected, atol=1e-4)


def test_without_a_prefix_such_a_policy_is_the_policy(prefixed, checkpoint, observation):
    plain = Runner.from_checkpoint(checkpoint).infer(observation).chunk.positions
    prefixed.infer(observation, continuation=Continuation(plain, np.zeros(8), prefix=3))
    np.testing.assert_allclose(prefixed.infer(observation).chunk.positions, plain, atol=1e-5)


def test_more_rows_than_a_policy_was_trained_for_are_refused(prefixed, engine, observation):
    wanted = np.zeros((8, 3))
    for runner, rows, most in ((prefixed, 4, 3), (engine, 1, 0)):
        with pytest.raises(RunnerError, match=f"trained to continue {most} rows and is given {rows}; choose another"):
            runner.infer(observation, continuation=Continuation(wanted, np.zeros(8), prefix=rows))


def test_a_continuation_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"Continuation.weights has shape \(3,\), expected \(4,\)"):
        Continuation(np.zeros((4, 2)), np.zeros(3))
