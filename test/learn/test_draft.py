"""A draft learns what its policy writes, and lies in its checkpoint."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from openvla_subject import SAVED, frames_of, load, observations, write_demonstrations

from vla_edge.cli import main
from vla_edge.engine.runner import Runner
from vla_edge.learn import draft as drafting
from vla_edge.learn.draft import DraftError, DraftFit, Told, first_draft, passes_of, told_by, train_draft
from vla_edge.learn.fit import FitConfig
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.draft_shapes import BLOCK, MEDUSA, DraftConfig
from vla_edge.policy.openvla_draft import make_draft

JOINTS = tuple(f"joint_{index}" for index in range(7))
FRAMES, TOKENS, WIDTH = 48, 7, 16


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    return write_demonstrations(tmp_path_factory.mktemp("shown"), JOINTS, FRAMES)


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(SAVED / "openvla" / "checkpoint", tmp_path / "checkpoint")


def config(kind: str) -> DraftConfig:
    sizes = {"width": 32, "hidden": 96} if kind == BLOCK else {}
    return DraftConfig(kind, WIDTH, TOKENS, 1, TOKENS - 2, **sizes)


def small(checkpoint, shown, **options):
    return train_draft(checkpoint, [shown], **{"width": 32, "steps": 4, "batch": 8, **options})


def test_what_is_learnt_from_is_what_decoding_writes():
    """Tokens of greedy decoding, and the very states that their heads scored."""
    policy, checkpoint = load("openvla")
    frames = frames_of(policy, checkpoint, 20)
    told = told_by(policy, frames)
    assert torch.equal(told_by(policy, frames.take(np.arange(5))).tokens, told.tokens[:5])
    with torch.no_grad():
        for index in range(len(frames)):
            one = frames.take([index])
            scores = policy.greedy(one.seen_by(policy), one.tokens, one.mask)[0]
            assert torch.equal(scores.argmax(-1), told.tokens[index])
            torch.testing.assert_close(policy.prefill.head(told.states[index]), scores, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [BLOCK, MEDUSA])
def test_passes_are_those_of_the_engine(kind):
    policy, checkpoint = load("openvla")
    told = told_by(policy, frames_of(policy, checkpoint, 12))
    torch.manual_seed(0)
    draft = first_draft(config(kind), policy).eval()
    policy.draft = draft
    policy.speculate_(3)
    runner = Runner.from_policy(policy, checkpoint)
    found = [runner.infer(observation).timing.passes for observation in observations(checkpoint.spec, 12)]
    np.testing.assert_array_equal(passes_of(draft, told), found)


@pytest.mark.parametrize("kind", [BLOCK, MEDUSA])
def test_it_learns_tokens_that_its_feature_tells(tmp_path, kind):
    """The next tokens are those of a few words that the state spells."""
    generator = torch.Generator().manual_seed(0)
    words, states = torch.randint(0, 256, (8, TOKENS), generator=generator), torch.randn(8, TOKENS, WIDTH, generator=generator)
    word = torch.randint(0, 8, (256,), generator=generator)
    told = Told(words[word], states[word])
    policy, _ = load("openvla")
    torch.manual_seed(0)
    draft = first_draft(config(kind), policy)
    draft.propose_(draft.config.most_tokens)
    before = passes_of(draft, told).mean()
    fit = DraftFit(FitConfig(steps=120, batch=32, rate=1e-2, warmup=10, average=0.9), draft, told, tmp_path)
    fit.train(1000)
    assert before > 4 and passes_of(fit.average, told).mean() < 2.5


@pytest.mark.parametrize("kind", [BLOCK, MEDUSA])
def test_the_command_puts_it_into_the_checkpoint_and_decoding_uses_it(checkpoint, shown, kind, capsys):
    options = ["--demonstrations", str(shown), "--steps", "3", "--batch", "4", "--width", "32", "--kind", kind]
    assert main(["draft", str(checkpoint), *options]) == 0
    assert "passes a chunk in the place of 6" in capsys.readouterr().out
    assert {path.name for path in checkpoint.parent.iterdir()} == {"checkpoint"}, "nothing of the work is left"
    policy = load_policy(load_checkpoint(checkpoint))
    assert policy.draft.config == config(kind)
    runner, plain = Runner.from_checkpoint(checkpoint), Runner.from_checkpoint(SAVED / "openvla" / "checkpoint")
    assert list(runner.stages) == ["vision", "prefill", "verify", "draft"]
    for observation in observations(load_checkpoint(checkpoint).spec, 6):
        np.testing.assert_array_equal(runner.infer(observation).chunk.positions, plain.infer(observation).chunk.positions)


def test_what_was_trained_is_what_is_loaded(checkpoint, shown):
    made = small(checkpoint, shown)
    loaded = load_policy(load_checkpoint(checkpoint)).draft
    again = make_draft(config(BLOCK))
    assert sum(p.numel() for p in again.parameters()) == made.parameters
    assert made.frames + made.compared == FRAMES and made.tokens_per_pass == made.plain_passes / made.passes
    inputs = torch.randn(2, WIDTH), torch.tensor([0, 3]), torch.randint(0, 256, (2, TOKENS))
    with torch.no_grad():
        scores = loaded(*inputs)[0]
        later = inputs[2].clone()
        later[0, 1:] = later[1, 4:] = 9  # behind the newest token nothing is looked at
        assert torch.equal(loaded(*inputs[:2], later)[0], scores)
        assert not torch.equal(loaded(inputs[0] + 1, *inputs[1:])[0], scores)


def test_an_interrupted_training_goes_on_to_the_same_draft(checkpoint, shown, tmp_path, monkeypatch):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    monkeypatch.setattr(drafting, "_SAVE_EVERY", 2)
    whole = small(checkpoint, shown)

    def stop(fraction: float, what: str) -> None:
        if what.startswith("training") and fraction > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(other, shown, progress=stop)
    assert not (other / "draft.safetensors").exists()
    begun = []
    small(other, shown, progress=lambda fraction, what: begun.append(fraction) if what.startswith("training") else None)
    assert begun[0] > 0.6, "not from the beginning"
    assert (other / "draft.safetensors").read_bytes() == whole.file.read_bytes()


@pytest.mark.parametrize(("options", "said"), [
    ({"kind": "tree"}, "there is no draft of kind 'tree'; allowed is block or medusa"),
    ({"width": 20}, "width is 20, allowed are multiples of 16"),
    ({"steps": 0}, "all must be above 0"),
    ({"rate": 0.0}, "all must be above 0"),
    ({"demonstrations": []}, "there are no demonstrations"),
])  # fmt: skip
def test_what_cannot_be_had_is_an_error_before_any_work(checkpoint, shown, options, said, monkeypatch):
    monkeypatch.setattr(drafting, "told_by", lambda *_: pytest.fail("work has begun"))
    options = {"demonstrations": [shown], "width": 32, "steps": 4, **options}
    with pytest.raises(DraftError, match=said):
        train_draft(checkpoint, **options)
    assert {path.name for path in checkpoint.parent.iterdir()} == {"checkpoint"}


def test_a_draft_that_is_there_is_kept_unless_told(checkpoint, shown):
    (checkpoint / "draft.safetensors").write_bytes(b"mine")
    with pytest.raises(DraftError, match="is there already; remove it, or train anew with --force"):
        small(checkpoint, shown)
    assert (checkpoint / "draft.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(("path", "said"), [
    (SAVED / "oft" / "checkpoint", "gives its actions at once; there is nothing to draft"),
    (SAVED.parent / "pi" / "pi0" / "checkpoint", "is a pi0, which writes no tokens"),
])  # fmt: skip
def test_policies_that_write_no_tokens_have_no_draft(tmp_path, shown, path, said):
    copy = shutil.copytree(path, tmp_path / "checkpoint")
    with pytest.raises(DraftError, match=said):
        small(copy, shown)


def test_a_student_has_no_draft_of_its_teacher(checkpoint, shown, tmp_path):
    from vla_edge.learn.distill import distill

    small(checkpoint, shown)
    made = distill(checkpoint, tmp_path / "student", 0.96, [shown], joints=["joint_[0-4]"], steps=2, batch=4)
    assert not (made.directory / "draft.safetensors").exists()
    assert load_policy(load_checkpoint(made.directory)).draft is None
