"""Every family that reads pictures among words can go on with fewer of their tokens, and does what it would do if the others
were hidden from there on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_edge.compress.calibrate import collect
from vla_edge.compress.importance import chunk_along
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.prune.tokens import Dimmer, choose_tokens, most_looked_at
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.build import build
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.runner import Runner
from vla_edge.learn.frames import from_observations
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.narrow import TokenChoice
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity"
TOKENS, ONCE = "openvla/openvla", "openvla/oft"
FLOWS = (
    "smolvla/interleaved", "smolvla/self_attention", "pi/pi0", "pi/pi05", "groot/lerobot", "groot/isaac", "groot17/lerobot",
    "groot17/keys",
)  # fmt: skip
FAMILIES = (*FLOWS, TOKENS, ONCE)


def load(name: str):
    """(policy, checkpoint) of its own."""
    checkpoint = load_checkpoint(SAVED / name / "checkpoint")
    return load_policy(checkpoint), checkpoint


def observations(spec, count: int, seed: int = 0) -> list[Observation]:
    rng = np.random.default_rng(seed)
    names = tuple(dict.fromkeys((*spec.joint_names, *spec.read_names)))
    found = []
    for index in range(count):
        images = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), np.uint8) for c in spec.cameras}
        joints = JointState(index, names, rng.normal(0, 0.3, len(names)))
        found.append(Observation(index, images, joints, ("touch the red cube", "push")[index % 2]))
    return found


class Hidden(TokenChoice):
    """Leaves all tokens in, and hides those that would go from every layer behind."""

    dims = True

    def __init__(self, choice: TokenChoice, places: torch.Tensor):
        super().__init__(choice.after, len(places), choice.heads, choice.places)
        self.stay, self.image = choice.count, places

    def forward(self, looks, mask):
        chosen, mask = super().forward(looks, mask)
        gone = self.image[chosen[:, self.stay :]]
        return chosen, mask.scatter(1, gone, 0.0)


def chunks(policy, checkpoint, shown) -> np.ndarray:
    runner = Runner.from_policy(policy, checkpoint)
    return np.stack([runner.infer(one).chunk.positions for one in shown])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_out_is_as_if_it_was_hidden(name):
    policy, checkpoint = load(name)
    shown, reader = observations(checkpoint.spec, 3), policy.reader
    whole = chunks(policy, checkpoint, shown)
    tokens = len(reader.image_places)
    assert tokens == policy.config.cameras * policy.config.image_tokens and reader.left_out == 0
    choice = most_looked_at(policy, 1, tokens // 2)
    reader.choice = choice
    fewer = chunks(policy, checkpoint, shown)
    assert reader.left_out == tokens - tokens // 2
    reader.choice = Hidden(choice, reader.image_places)
    np.testing.assert_allclose(fewer, chunks(policy, checkpoint, shown), atol=2e-5, rtol=1e-4)
    assert name == TOKENS or np.abs(fewer - whole).max() > 1e-3  # or there was nothing to be seen
    reader.choice = most_looked_at(policy, 1, tokens)
    np.testing.assert_allclose(chunks(policy, checkpoint, shown), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_that_follow_are_smaller(name):
    """Of keys, values and masks so many tokens, and of nothing else anything."""
    policy, _ = load(name)
    before = policy.stages()
    policy.reader.choice = choice = most_looked_at(policy, 1, len(policy.reader.image_places) // 2)
    gone = len(policy.reader.image_places) - choice.count
    told = 0
    for stage, earlier in zip(policy.stages(), before, strict=True):
        for spec, old in zip((*stage.inputs, *stage.outputs), (*earlier.inputs, *earlier.outputs), strict=True):
            shorter = [(a, b) for a, b in zip(spec.shape, old.shape, strict=True) if a != b]
            assert not shorter or shorter == [(shorter[0][1] - gone, shorter[0][1])], spec.name
            told += bool(shorter)
    assert told == (0 if name == ONCE else 6)


@pytest.mark.parametrize("name", FAMILIES)
def test_how_far_a_token_moves_the_chunk_is_the_slope_of_hiding_it(name):
    """What the choice is fitted to, against numbers."""
    policy, checkpoint = load(name)
    reader, frames = policy.reader, from_observations(observations(checkpoint.spec, 1), checkpoint.spec, checkpoint.tokenizer_path)
    reader.choice = dimmer = Dimmer(1, len(reader.image_places), policy.config.heads)
    shape = (1, policy.config.chunk_size, checkpoint.spec.max_action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    frames.chunk_of(policy, noise, 2).square().sum().backward()
    gradient = dimmer.dim.grad[0, reader.image_places]
    assert gradient.isfinite().all() and gradient.abs().min() > 0

    class Dimmed(Dimmer):
        def forward(self, looks, mask):
            everything, mask = super().forward(looks, mask)
            return everything, mask - self.by

    def loss(place: int, by: float) -> float:
        reader.choice = Dimmed(1, len(reader.image_places), policy.config.heads)
        reader.choice.by = torch.zeros(reader.tokens).index_fill(0, reader.image_places[[place]], by)
        with torch.no_grad():
            return float(frames.chunk_of(policy, noise, 2).double().square().sum())

    for place in gradient.abs().topk(2).indices.tolist():
        step = 3e-6
        assert (loss(place, step) - loss(place, -step)) / (2 * step) == pytest.approx(float(gradient[place]), rel=0.1)


@pytest.mark.parametrize("name", [TOKENS, ONCE])
def test_what_is_trained_is_what_the_stages_compute(name):
    """One pass over prompts of different lengths; tokens behind them read what stays alone, in every layer."""
    policy, checkpoint = load(name)
    frames = from_observations(observations(checkpoint.spec, 6), checkpoint.spec, checkpoint.tokenizer_path)
    policy.reader.choice = most_looked_at(policy, 1, len(policy.reader.image_places) // 2)
    assert len(set(frames.mask.sum(1).tolist())) == 2
    asked = {"features": True, "looks": True}
    with torch.no_grad():
        seen = [one.seen_by(policy) for one in map(frames.take, ([index] for index in range(6)))]
        if name == ONCE:
            wanted = [policy.chunk(seen[i], frames.tokens[[i]], frames.mask[[i]], frames.state[[i]]) for i in range(6)]
            said = policy.say(torch.cat(seen), frames.tokens, frames.mask, frames.state, **asked)
            torch.testing.assert_close(said.output, torch.cat(wanted), atol=2e-5, rtol=1e-4)
            return
        scores = torch.cat([policy.greedy(seen[i], frames.tokens[[i]], frames.mask[[i]]) for i in range(6)])
        told = scores.argmax(-1).unflatten(1, (1, -1))
        said = policy.say(torch.cat(seen), frames.tokens, frames.mask, frames.state, tokens=told, **asked)
        torch.testing.assert_close(said.output.flatten(1, 2), scores, atol=2e-5, rtol=1e-4)
        for index in range(6):
            _, _, keys, values, mask = policy.prefill(seen[index], frames.tokens[[index]], frames.mask[[index]])
            for ours, theirs in zip(said.features, (keys, values)):
                torch.testing.assert_close(ours[:, [index]], theirs * mask[:, None, :, None], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "seen"), [("pi/pi0", 24), ("groot17/keys", 24), (TOKENS, 100), (ONCE, 100)])
def test_worth_tells_how_far_tokens_move_the_chunk_elsewhere(name, seen):
    """On pictures that it was not learned from, even of random policies."""
    policy, checkpoint = load(name)
    spec, tokens = checkpoint.spec, len(policy.reader.image_places)
    choice = choose_tokens(policy, checkpoint, 1, tokens // 2, observations(spec, seen, seed=2))
    policy.reader.choice = dimmer = Dimmer(1, tokens, policy.config.heads)
    frames = from_observations(observations(spec, seen, seed=1), spec, checkpoint.tokenizer_path)
    generator, alike = torch.Generator().manual_seed(1), []
    for index in range(seen):
        chunk_along(policy, spec, frames.take([index]), generator).backward()
        worth = (dimmer.looks[0] * choice.heads[:, None]).sum(0) + choice.places
        moves = dimmer.dim.grad[0, policy.reader.image_places].abs()
        alike.append(np.corrcoef(worth.numpy(), moves.numpy())[0, 1])
    assert np.mean(alike) > 0.1


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("pi/pi0", []),
        ("groot17/lerobot", [{"kv_cache": {"bits": 8}}]),
        (TOKENS, []),
        (TOKENS, [{"fixed_point": {}}]),
        (TOKENS, [{"speculate": {"draft": "history"}}]),
        (TOKENS, [{"kv_cache": {"bits": 4, "salient": 0.2}}]),
        (ONCE, [{"vision_cache": {}}]),
    ],
)
def test_a_bundle_does_what_the_policy_does(name, more, tmp_path, monkeypatch):
    monkeypatch.setattr("vla_edge.engine.native.rewrite.library", lambda: None)
    _, checkpoint = load(name)
    data = collect(observations(checkpoint.spec, 8), "random observations", frames=4, held_out=4)
    recipe = parse_recipe({"name": "fewer", "steps": [{"prune_tokens": {"after": 1}}, *more]})
    recipe = replace(recipe, accept=replace(recipe.accept, action_error_rel=None))
    path = build(checkpoint.directory, recipe, "onnxruntime", tmp_path / "fewer", data)
    made = carry_out(recipe, *load(name), data, lambda *_: None)
    ours = np.stack([Runner.from_bundle(path).infer(one).chunk.positions for one in data.held_out])
    np.testing.assert_allclose(ours, chunks(made.policy, checkpoint, data.held_out), atol=1e-3)
    manifest = Bundle.load(path).manifest
    if name != ONCE:
        assert manifest["cache"]["bytes"] < manifest["cache"]["full_precision_bytes"]


@pytest.mark.parametrize("name", ["pi/pi05", "groot/lerobot", TOKENS, ONCE])
def test_what_goes_on_with_fewer_tokens_can_be_trained(name, tmp_path):
    loaded = load(name)
    data = collect(observations(loaded[1].spec, 8), "random observations", frames=6, held_out=2)
    train = {"finetune": {"steps": 2, "batch": 2, "attention": 0.5}}
    recipe = parse_recipe({"steps": [{"prune_tokens": {"after": 1, "by": "attention"}}, train]})
    made = carry_out(recipe, *loaded, data, lambda *_: None, work=tmp_path).policy
    assert made.reader.left_out > 0 == loaded[0].reader.left_out
    assert np.isfinite(chunks(made, loaded[1], data.held_out)).all()


def test_who_writes_all_tokens_in_a_stage_of_its_own_reads_all_of_them():
    policy, _ = load(TOKENS)
    assert policy.can_generate
    policy.reader.choice = most_looked_at(policy, 1, 2)
    assert not policy.can_generate


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [
        ("baselines/act", [{"prune_tokens": {}}], "leave image tokens out of the policy, which cannot be done to this family"),
        (TOKENS, [{"prune_tokens": {"after": 1}}, {"prefill_blocks": {}}], "known when all of the prompt was read; drop one"),
        (TOKENS, [{"prune_tokens": {"after": 9}}], "text layers; allowed is 1 to"),
        (TOKENS, [{"prune_tokens": {"by": "looks"}}], "by is 'looks', allowed is action, attention"),
        ("pi/pi0", [{"shrink": {"targets": ["*"], "blocks": 1}}], "take whole layers out of the policy, which cannot be done"),
    ],
)
def test_what_cannot_be_is_an_error_before_any_work(name, steps, said):
    _, checkpoint = load(name)
    data = collect(observations(checkpoint.spec, 4), "random observations", frames=2, held_out=2)
    with pytest.raises(RecipeError, match=said):
        carry_out(parse_recipe({"name": "test", "steps": steps}), *load(name), data, lambda *_: pytest.fail("work has begun"))
