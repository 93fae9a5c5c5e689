"""A led flow ends in the plan it was to continue, and leaves the rest to the network."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import make_observations

from vla_edge.engine.continuation import Continuation, inpaint
from vla_edge.engine.runner import Runner
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


def test_a_continuation_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"Continuation.weights has shape \(3,\), expected \(4,\)"):
        Continuation(np.zeros((4, 2)), np.zeros(3))
