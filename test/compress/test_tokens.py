"""Fewer image tokens after the first text layers: those that move the robot stay, and what follows is smaller."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_subject import Subject, make_observations

from vla_edge.compress.calibrate import CalibrationError, collect
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.prune.tokens import Dimmer, choose_tokens, worth_of
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.runner import Runner
from vla_edge.learn.frames import from_observations
from vla_edge.policy.blocks import MASKED
from vla_edge.policy.narrow import TokenChoice

PRUNE = {"prune_tokens": {"keep": 0.5, "after": 1}}


@pytest.fixture(scope="module")
def data():
    return collect(make_observations(12), "random observations", frames=8, held_out=4)


@pytest.fixture
def frames(subject):
    checkpoint = subject.checkpoint
    return from_observations(make_observations(6), checkpoint.spec, checkpoint.tokenizer_path)


def shown(policy, frames, places=None):
    """The cache, with only the image tokens of `places` in favour."""
    if places is not None:
        worth = torch.zeros(4)
        worth[list(places)] = 10.0
        policy.prefix.choice = TokenChoice(1, len(places), torch.zeros(4), worth)
    with torch.no_grad():
        cache, looks = frames.shown_to(policy)
    policy.prefix.choice = None
    return cache, looks


def test_all_tokens_chosen_is_as_none_chosen(subject, frames):
    for ours, theirs in zip(shown(subject.policy, frames, range(4))[0], shown(subject.policy, frames)[0]):
        np.testing.assert_array_equal(ours, theirs)


def test_the_tokens_that_stay_are_what_they_were_and_where_they_were(subject, frames):
    policy = subject.policy
    cache, looks = shown(policy, frames, (3, 1))
    whole, whole_looks = shown(policy, frames)
    kept = [1, 3, *range(4, 17)]
    np.testing.assert_allclose(cache.keys[0], whole.keys[0][:, :, kept], atol=1e-6)
    np.testing.assert_array_equal(cache.mask, whole.mask[:, kept])
    np.testing.assert_array_equal(cache.cos, whole.cos, err_msg="actions stand where they stood")
    # the last layer's keys and values follow from the first layer's output, token by token
    np.testing.assert_allclose(cache.values[1], whole.values[1][:, :, kept], atol=1e-6)
    assert looks[0].shape == whole_looks[0].shape


def test_the_gradient_of_a_dimmed_token_is_that_of_its_mask(subject, frames):
    policy, prefix = subject.policy, subject.policy.prefix
    prefix.choice = dimmer = Dimmer(1, 4, 4)
    one = frames.take([0])
    cache, _ = one.shown_to(policy)
    x, condition = torch.randn(1, 8, 8), policy.time(torch.ones(1))[0]
    policy.denoise(x, condition, *cache)[0].square().sum().backward()
    gradient = dimmer.dim.grad.clone()

    def loss(amount: float, token: int) -> float:
        policy.prefix.choice = None
        mask = cache.mask.detach().clone()
        mask[0, token] -= amount
        with torch.no_grad():
            return float(policy.denoise(x, condition, *cache[:2], mask, *cache[3:])[0].double().square().sum())

    for token in (0, 3, 5):  # nothing but the action expert looks after the tiny policy's first layer
        step = 20 / -MASKED / 100
        numeric = (loss(step, token) - loss(-step, token)) / (2 * step)
        assert gradient[0, token].item() == pytest.approx(numeric, rel=0.05, abs=1e-3 * gradient.abs().max().item())
    np.testing.assert_allclose(dimmer.looks.sum(-1) < 1, True)


def test_worth_is_found_again_where_it_is_known():
    rng = np.random.default_rng(0)
    looks, heads, places = rng.random((200, 9, 3)), np.array([2.0, 0.0, 0.5]), rng.random(9)
    moves = looks @ heads + places
    sizes = rng.uniform(0.1, 10, (200, 1))
    found_heads, found_places = worth_of(looks, moves / moves.mean(1, keepdims=True) * sizes)
    order = np.argsort(-(looks @ heads + places), 1)[:, :4]
    ours = np.argsort(-(looks @ found_heads + found_places), 1)[:, :4]
    same = np.mean([len(set(a) & set(b)) for a, b in zip(order, ours)]) / 4
    assert same > 0.97 and found_heads[0] > 3 * found_heads[2] > 10 * abs(found_heads[1])
    only_places = worth_of(np.zeros((200, 9, 3)), np.tile(places, (200, 1)))
    np.testing.assert_allclose(only_places[1], places / places.mean(), rtol=1e-5)


def test_the_tokens_that_matter_stay(loaded, subject):
    """Against leaving out each token in turn: what is chosen loses less than what is not."""
    policy, checkpoint = subject.policy, subject.checkpoint
    trained = [parameter.requires_grad for parameter in policy.parameters()]
    choice = choose_tokens(policy, checkpoint, 1, 2, make_observations(24, seed=2))
    assert policy.prefix.choice is None and [p.requires_grad for p in policy.parameters()] == trained
    wanted = subject.chunks()

    def error(heads, places) -> float:
        policy.prefix.choice = TokenChoice(1, 2, heads, places)
        return float(np.abs(Subject(policy, checkpoint).chunks() - wanted).mean())

    assert error(choice.heads, choice.places) < error(-choice.heads, -choice.places)


def test_later_stages_shrink_and_work_together_with_the_rest(loaded, data, tmp_path):
    recipe = parse_recipe({"steps": [
        PRUNE, {"finetune": {"steps": 2, "batch": 4, "attention": 0.5}},
        {"quantize": {"targets": ["*"], "activations": "int8"}},
    ]})  # fmt: skip
    done = carry_out(recipe, *loaded, data, lambda *_: None, work=tmp_path)
    prefix, denoise = (next(s for s in done.policy.stages() if s.name == name) for name in ("prefix", "denoise"))
    assert prefix.outputs[0].shape[3] == denoise.inputs[2].shape[3] == 15
    assert loaded[0].prefix.choice is None and loaded[0].stages()[1].outputs[0].shape[3] == 17
    chunk = Runner.from_policy(done.policy, loaded[1]).infer(data.held_out[0]).chunk
    assert np.isfinite(chunk.positions).all()


def test_without_observations_or_with_broken_ones_nothing_is_chosen(subject):
    with pytest.raises(CalibrationError, match="no observations"):
        choose_tokens(subject.policy, subject.checkpoint, 1, 2, [])
    with pytest.raises(CalibrationError, match="not finite"):
        worth_of(np.zeros((1, 4, 2)), np.full((1, 4), np.nan))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"prune_tokens": {"keep": 0.1, "after": 1}}], "leaves 0 of 4 image tokens; at least one must stay"),
        ([{"prune_tokens": {"keep": 0.9, "after": 1}}], "leaves 4 of 4 image tokens"),
        ([{"prune_tokens": {"keep": 0.0}}], "keep is 0.0, allowed is above 0, below 1"),
        ([{"prune_tokens": {"keep": 1.0}}], "keep is 1, allowed is"),
        ([{"prune_tokens": {"after": 0}}], "after is 0, allowed is"),
        ([{"prune_tokens": {"after": 2}}], "2 text layers; allowed is 1 to 1"),
        ([PRUNE, PRUNE], "there twice"),
        ([PRUNE, {"shrink": {"targets": ["*"], "heads": 0.5}}], "put it first"),
        ([{"quantize": {"targets": ["*"]}}, PRUNE], "put it first"),
        ([{"prune_tokens": {"share": 0.5}}], "unknown key 'share'"),
    ],
)
def test_what_cannot_be_is_an_error_before_any_work(loaded, data, steps, said):
    with pytest.raises(RecipeError, match=said):
        carry_out(parse_recipe({"steps": steps}), *loaded, data, lambda *_: pytest.fail("work has begun"))
