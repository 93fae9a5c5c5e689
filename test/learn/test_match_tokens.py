"""Policies that write their actions as tokens, or give them at once, are trained against a teacher like any other."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from openvla_subject import SAVED, apart, frames_of, load, observations

from vla_edge.compress.calibrate import collect
from vla_edge.compress.fake import installed
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.recipe import Accept, RecipeError, parse_recipe
from vla_edge.engine.build import build
from vla_edge.engine.runner import Runner
from vla_edge.engine.trace import policy_layers
from vla_edge.learn.constrained import constrain, release
from vla_edge.learn.match import Match, MatchConfig
from vla_edge.learn.outputs import output_of
from vla_edge.policy.bins import bin_values, bins_of

INT4 = {"quantize": {"targets": ["*"], "weights": "int4", "group_size": 32}}
PRUNE = {"prune": {"targets": ["*"], "method": "magnitude", "sparsity": 0.5}}
SHRINK = {"shrink": {"targets": ["*"], "channels": 0.5}}
WIDE = MatchConfig(attention=1.0)


@pytest.fixture(scope="module", params=["openvla", pytest.param("oft", marks=pytest.mark.slow)])
def subject(request):
    """(policy, checkpoint)."""
    return load(request.param)


@pytest.fixture(scope="module")
def tokens():
    """(policy, checkpoint) of one that writes tokens."""
    return load("openvla")


def train(steps: int, **options) -> dict:
    return {"finetune": {"steps": steps, "batch": 16, "rate": 2e-3, **options}}


def carried_out(subject, work, *steps, **options):
    data = collect(observations(subject[1].spec, 96), "random observations", frames=48, held_out=4)
    recipe = parse_recipe({"name": "test", "steps": list(steps)})
    return carry_out(recipe, *subject, data, tell=options.pop("tell", lambda *_: None), work=work, **options)


def from_teacher(subject, compressed) -> tuple[float, float]:
    """Of what became of the subject, on observations that nothing was trained on."""
    teacher, frames = copy.deepcopy(subject[0]), frames_of(*subject, 48, seed=9)
    with installed(policy_layers(compressed.policy.stages()), compressed.layers):
        return apart(teacher, compressed.policy, frames)


def test_words_and_bins_are_inverse_of_each_other():
    words = np.arange(1, 256)
    np.testing.assert_array_equal(bins_of(bin_values()[words]), words)
    np.testing.assert_array_equal(bins_of(np.array([-7.0, -1.0, 0.9999, 1.0, 7.0])), [255, 255, 1, 0, 0])


def test_what_is_trained_is_what_the_stages_compute(subject):
    """One pass over prompts of different lengths, told the tokens that decoding one by one chooses."""
    policy, _ = subject
    frames, kind = frames_of(*subject, 8), output_of(policy)
    assert len(set(frames.mask.sum(1).tolist())) == 2
    with torch.no_grad():
        output = kind.answer(policy, frames, None, kind.question(frames.actions, WIDE, None), WIDE).output
        for index in range(len(frames)):
            one = frames.take([index])
            seen = one.seen_by(policy), one.tokens, one.mask
            wanted = policy.greedy(*seen).unflatten(1, (1, 7)) if kind.tempered else policy.chunk(*seen, one.state)
            torch.testing.assert_close(output[index : index + 1], wanted, atol=2e-5, rtol=1e-4)


def test_its_own_actions_are_the_tokens_it_chooses(tokens):
    """The word with the lowest id too, whose value is that of the next."""
    policy, checkpoint = copy.deepcopy(tokens[0]), tokens[1]
    with torch.no_grad():
        policy.prefill.head.weight[1:] *= 0.01
        frames = frames_of(policy, checkpoint, 8)
        shown = [frames.take([index]) for index in range(8)]
        chosen = [policy.greedy(one.seen_by(policy), one.tokens, one.mask).argmax(-1) for one in shown]
    question = output_of(policy).question(frames.actions, None, None)
    assert (question.flatten(1) == torch.cat(chosen)).all() and (question == 0).any()


def test_features_are_the_cache_that_decoding_reads(tokens):
    policy, _ = tokens
    frames, kind = frames_of(*tokens, 4), output_of(policy)
    with torch.no_grad():
        answer = kind.answer(policy, frames, None, kind.question(frames.actions, None, None), WIDE)
        for index in range(4):
            one = frames.take([index])
            _, position, *cache = policy.prefill(one.seen_by(policy), one.tokens, one.mask)
            for ours, theirs in zip(answer.features, cache):
                there = int(position)
                torch.testing.assert_close(ours[:, [index], :, :there], theirs[..., :there, :], atol=1e-5, rtol=1e-4)
                assert not ours[:, index, :, there:].any(), "padding counts nothing"
    assert [look.shape[2] for look in answer.looks] == [7] * 3
    torch.testing.assert_close(answer.looks[0].sum(-1), torch.ones(4, 4, 7))


def test_the_divergence_is_that_of_the_softened_probabilities(tokens):
    kind, generator = output_of(tokens[0]), torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 1, 3, 256, generator=generator) * 3 for _ in range(2))
    for temperature in (1.0, 4.0):
        p, q = ((scores.double() / temperature).softmax(-1) for scores in (theirs, ours))
        wanted = (p * (p / q).log()).sum(-1).mean() * temperature**2
        found = kind.distance(ours, theirs, MatchConfig(temperature=temperature))
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert kind.distance(ours, ours, MatchConfig()).item() == pytest.approx(0, abs=1e-6)


def test_activations_are_computed_again_and_not_kept(tokens):
    """What a step holds for the backward pass is, of each text layer, its input and what is compared."""
    policy, frames = copy.deepcopy(tokens[0]), frames_of(*tokens, 8)
    kind, plain = output_of(policy), MatchConfig(features=0.0)
    question, seen = kind.question(frames.actions, None, None), frames.seen_by(policy).detach()
    held = {}

    def keep(tensor):
        held[tensor.data_ptr()] = tensor.numel() if tensor.shape[:1] == (8,) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        said = policy.say(seen, frames.tokens, frames.mask, frames.state, tokens=question)
    c = policy.config
    length = c.prompt_length + c.tokens - 1
    assert plain.features == 0 and not said.features and not said.looks
    layer_input, scores = 8 * length * c.width, 8 * length**2 * c.heads
    # the masks and the table of places besides; the probabilities of a single layer would be as much as all of it
    assert sum(held.values()) < (c.layers + 4) * layer_input + 8 * length**2 < c.layers * scores


@pytest.mark.parametrize(
    ("step", "training", "left"),
    [
        pytest.param(PRUNE, train(40), 0.7, id="pruned"),
        pytest.param(SHRINK, train(40), 0.85, id="shrunk", marks=pytest.mark.slow),
        pytest.param(INT4, train(60, rate=1e-3), 0.85, id="rounded", marks=pytest.mark.slow),
    ],
)
def test_training_brings_tokens_back_to_the_teachers_on_what_it_has_not_seen(tokens, tmp_path, step, training, left):
    before = from_teacher(tokens, carried_out(tokens, tmp_path / "before", step))
    after = from_teacher(tokens, carried_out(tokens, tmp_path / "after", step, training))
    assert after[0] < left * before[0] and after[1] > before[1] + 0.02


@pytest.mark.slow
def test_training_brings_actions_back_to_the_teachers_on_what_it_has_not_seen(tmp_path):
    """Pruned alone: what is lost otherwise is too little of so erratic a policy to be learnt for other observations."""
    subject = load("oft")
    before, after = (
        from_teacher(subject, carried_out(subject, tmp_path / name, PRUNE, *more))
        for name, more in (("before", ()), ("after", (train(40),)))
    )
    assert after[0] < 0.8 * before[0]


def test_rounding_and_zeros_hold_through_training(tokens, tmp_path):
    rounded = carried_out(tokens, tmp_path / "a", PRUNE, INT4)
    trained = carried_out(tokens, tmp_path / "b", PRUNE, INT4, train(3))
    assert any((layer.weight.values != rounded.layers[n].weight.values).any() for n, layer in trained.layers.items())
    for name, layer in trained.layers.items():
        np.testing.assert_array_equal(layer.weight.scales, rounded.layers[name].weight.scales)
        assert not layer.weight.values[rounded.layers[name].weight.values == 0].all()
        assert (layer.weight.values == 0).mean() >= 0.5, name


def test_a_layer_that_stages_share_is_constrained_and_released_in_all_of_them(tokens):
    policy = copy.deepcopy(tokens[0])
    policy.revise_()
    layers = carried_out(tokens, None, INT4).layers
    constrain(policy, layers, ())
    assert policy.decode.head is policy.prefill.head is policy.revise.head
    assert set(release(policy)) == set(layers)
    assert type(policy.decode.head) is torch.nn.Linear
    assert policy.decode.head is policy.prefill.head is policy.revise.head


@pytest.mark.parametrize("together", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_trained_policy_is_built_into_an_engine(tokens, tmp_path, together):
    data = collect(observations(tokens[1].spec, 24), "random observations", frames=12, held_out=4)
    rounded = {"quantize": {"targets": ["*"], "weights": "int8"}}
    steps = [SHRINK, *([{"fixed_point": {}}] if together else []), rounded, train(3)]
    recipe = replace(parse_recipe({"name": "trained", "steps": steps}), accept=Accept())
    path = build(tokens[1].directory, recipe, "onnxruntime", tmp_path / "b", data)
    engine, teacher = Runner.from_bundle(path), Runner.from_policy(*tokens)
    chunks = [(engine.infer(o).chunk.positions, teacher.infer(o).chunk.positions) for o in data.held_out]
    assert all(np.isfinite(ours).all() and ours.shape == theirs.shape for ours, theirs in chunks)
    assert any((ours != theirs).any() for ours, theirs in chunks)


def test_an_interrupted_training_goes_on_to_the_same_weights(tokens, tmp_path):
    frames, config = frames_of(*tokens, 16), MatchConfig(steps=8, batch=4, attention=1.0, average=0.5)

    def run(name: str) -> Match:
        return Match(config, copy.deepcopy(tokens[0]), tokens[0], frames, tmp_path / name)

    whole, cut = run("whole"), run("cut")
    with torch.no_grad():  # all begin away from the teacher
        for fit in (whole, cut):
            fit.module.prefill.head.weight.mul_(0.5)
    whole.train(4)
    for _ in range(4):
        cut.update()
    cut.save()
    cut.update()  # lost
    again = run("cut")
    assert again.step == 4
    again.train(4)
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(again.average.state_dict()[name], value, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [
        ("openvla", [{"few_steps": {"num_steps": 1}}], r"step 1 \(few_steps\) is for flow policies"),
        ("openvla", [SHRINK, {"few_steps": {}}], r"step 2 \(few_steps\) is for flow policies"),
        ("openvla", [{"flow_steps": {"num_steps": 1}}, train(1)], r"step 1 \(flow_steps\) is for flow policies"),
        ("oft", [{"flow_steps": {"evaluations": 1}}], "is for flow policies"),
        ("oft", [{"few_steps": {"num_steps": 1}}], "is for flow policies"),
        ("oft", [train(1, temperature=2.0)], "temperature is for policies that write their actions as tokens"),
        ("openvla", [train(1, temperature=0.0)], "temperature is 0.0, allowed is above 0"),
        ("openvla", [train(1, shown=1.0)], "give it demonstrations"),
        ("openvla", [{"kv_cache": {}}, train(1)], "put it before kv_cache"),
        ("oft", [train(1), {"kv_cache": {}}], "kv_cache is for policies that read their keys and values again"),
        ("openvla", [{"shrink": {"targets": ["*"], "blocks": 1}}, train(1)], "cannot be done to this family"),
        ("openvla", [train(1), {"prune_tokens": {"after": 1}}], "put it first"),
    ],
)
def test_what_does_not_fit_the_policy_is_an_error_before_any_work(name, steps, said, tmp_path, monkeypatch):
    from vla_edge.compress import pipeline

    monkeypatch.setattr(pipeline, "compress_policy", lambda *_, **__: pytest.fail("work has begun"))
    monkeypatch.setattr(pipeline, "_train", lambda *_, **__: pytest.fail("training has begun"))
    with pytest.raises(RecipeError, match=said):
        carried_out(load(name), tmp_path / "work", *steps)
    assert not (tmp_path / "work").exists()


def test_a_temperature_is_refused_for_a_flow(tmp_path):
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    checkpoint = load_checkpoint(SAVED.parent / "pi" / "pi0" / "checkpoint")
    with pytest.raises(RecipeError, match="temperature is for policies that write their actions as tokens"):
        carried_out((load_policy(checkpoint), checkpoint), tmp_path, train(1, temperature=2.0))
