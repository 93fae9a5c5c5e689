"""A student has the size, the joints and the instructions that were asked for, and is a checkpoint like any other."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))
from tiny import JOINTS, WORDS, make_observations, tiny_policy, tiny_spec  # noqa: E402

from vla_edge.engine.runner import Runner
from vla_edge.evaluate.recording import open_recording
from vla_edge.learn.distill import DistillError, channel_share, distill, joint_columns, parameters
from vla_edge.learn.frames import from_demonstrations
from vla_edge.learn.match import Match, MatchConfig
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.checkpoint_files import CheckpointError, read_tensors
from vla_edge.policy.checkpoint_writer import write_checkpoint
from vla_edge.policy.smolvla_student import keep_joints
from vla_edge.sim.demonstrations import DemonstrationError

COLOURS = ("red", "green")
RECORDED = ("c_joint", *JOINTS[:2])  # in another order than the policy's


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Directory of the tiny policy, with more words in its directory of the backbone than its weights need."""
    return write_checkpoint(tmp_path_factory.mktemp("teacher") / "checkpoint", tiny_policy(), tiny_spec(), WORDS)


@pytest.fixture(scope="module")
def shown(teacher, tmp_path_factory):
    """Four episodes of twelve frames, red and green in turn, in which the teacher shows what it would do."""
    directory, rng = tmp_path_factory.mktemp("shown"), np.random.default_rng(0)
    (directory / "recording.json").write_text(json.dumps({"joint_names": RECORDED, "dt": 0.05}))
    state = rng.normal(0, 0.3, (48, 3)).astype(np.float32)
    arrays = dict(
        images=rng.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8), state=state,
        pointer=np.full((48, 2), 16, np.float32), goal=np.zeros(48, np.int32),
        instruction=np.array([f"touch the {COLOURS[i // 12 % 2]} cube with your left hand" for i in range(48)]),
        episode=np.repeat(np.arange(4), 12), step=np.tile(np.arange(12, dtype=np.int32), 4),
    )  # fmt: skip
    np.savez_compressed(directory / "shard-0000.npz", **arrays)
    runner = Runner.from_checkpoint(teacher)
    with open_recording(directory) as recording:
        chunks = [runner.infer(moment.read()).chunk.positions for moment in recording.moments(runner.spec)]
    action = np.array(chunks, np.float32)[..., [JOINTS.index(name) for name in RECORDED]]
    np.savez_compressed(directory / "shard-0000.npz", **arrays, action=action)
    return directory


def make(teacher, shown, output, **options):
    return distill(teacher, output, **{"size": 0.6, "demonstrations": [shown], "steps": 3, "batch": 8, **options})


def test_the_student_has_the_size_that_was_asked_for_in_a_checkpoint_like_any_other(teacher, shown, tmp_path):
    made = make(teacher, shown, tmp_path / "student")
    assert made.teacher_parameters == sum(p.numel() for p in tiny_policy().parameters())
    assert 0.57 < made.parameters / made.teacher_parameters <= 0.6
    student = load_policy(load_checkpoint(made.directory))
    assert sum(p.numel() for p in student.parameters()) == made.parameters
    assert made.frames == 48 and 0 < made.action_error_rel < 1 and made.joints == JOINTS
    chunk = Runner.from_checkpoint(made.directory).infer(make_observations(1)[0]).chunk
    assert chunk.joint_names == JOINTS and np.isfinite(chunk.positions).all()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        theirs = (teacher / "backbone" / name).read_bytes()
        assert (made.directory / "backbone" / name).read_bytes() == theirs
    assert [path.name for path in tmp_path.iterdir()] == ["student"], "nothing of the work is left"


def test_lerobot_finds_tensors_of_the_width_it_gives_an_expert(teacher, shown, tmp_path):
    """LeRobot derives that width from the expert's; channels that the student lacks are zeros there."""
    made = make(teacher, shown, tmp_path / "student")
    theirs, ours = (read_tensors(path / "model.safetensors", "torch") for path in (teacher, made.directory))
    names = [name for name in ours if "lm_expert" in name and "mlp" in name]
    assert len(names) == 6
    used = json.loads((made.directory / "vla_edge.json").read_text())["expert_hidden"]
    for name in names:
        assert ours[name].shape == theirs[name].shape
        channels = ours[name] if "down" in name else ours[name].T
        assert channels.abs().sum(0).count_nonzero() == used < 256
    # a copy that does not know of it computes the same
    facts = json.loads((made.directory / "vla_edge.json").read_text())
    del facts["expert_hidden"]
    observation = make_observations(1)[0]
    narrow = Runner.from_checkpoint(made.directory).infer(observation).chunk.positions
    (made.directory / "vla_edge.json").write_text(json.dumps(facts))
    wide = Runner.from_checkpoint(made.directory).infer(observation).chunk.positions
    np.testing.assert_allclose(narrow, wide, atol=1e-6)


@pytest.mark.parametrize(("width", "said"), [(257, "expert_hidden = 257"), (8, "is more than"), (0, "at least 1")])
def test_a_width_that_is_not_the_tensors_is_refused(teacher, shown, tmp_path, width, said):
    directory = write_checkpoint(tmp_path / "wrong", tiny_policy(), tiny_spec(), WORDS)
    facts = json.loads((directory / "vla_edge.json").read_text())
    (directory / "vla_edge.json").write_text(json.dumps(facts | {"expert_hidden": width}))
    with pytest.raises(CheckpointError, match=said):
        load_policy(load_checkpoint(directory))


def test_fewer_joints_and_instructions_make_a_student_for_them_alone(teacher, shown, tmp_path):
    made = make(teacher, shown, tmp_path / "student", size=1.0, joints=["c_*", "b_joint"], instructions=["*green*"])
    assert made.joints == ("b_joint", "c_joint"), "in the teacher's order"
    checkpoint = load_checkpoint(made.directory)
    spec, whole = checkpoint.spec, tiny_spec()
    assert (spec.max_state_dim, spec.max_action_dim) == (2, 2) and spec.joint_names == made.joints
    for ours, theirs in ((spec.state, whole.state), (spec.action, whole.action)):
        for name, values in ours.statistics.items():
            assert values == pytest.approx([theirs.statistics[name][i] for i in (0, 2)])
    assert made.frames == 24 and 0 < made.action_error_rel < 2
    assert Runner.from_checkpoint(made.directory).infer(make_observations(1)[0]).chunk.positions.shape == (8, 2)


def test_a_joint_is_the_same_before_and_after_others_are_left_out():
    """As long as nothing of the others reaches it: with their state and noise at zero."""
    policy = tiny_policy()
    student, columns = copy.deepcopy(policy), [0, 2]
    keep_joints(student, columns)
    torch.manual_seed(1)
    state, x = torch.zeros(1, 8), torch.zeros(1, 8, 8)
    state[:, columns], x[..., columns] = torch.randn(1, 2), torch.randn(1, 8, 2)
    tokens, words = torch.randn(1, 4, 32), torch.ones(1, 12, dtype=torch.int64)
    mask = words.bool()
    with torch.no_grad():
        condition = policy.time(torch.ones(1))[0]
        wanted = policy.denoise(x, condition, *policy.prefix(tokens, words, mask, state))[0][..., columns]
        ours = student.denoise(x[..., columns], condition, *student.prefix(tokens, words, mask, state[:, columns]))[0]
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_a_student_of_some_joints_learns_their_part_of_the_teachers_flow(teacher, shown, tmp_path):
    checkpoint = load_checkpoint(teacher)
    policy, columns = load_policy(checkpoint), [0, 2]
    student = copy.deepcopy(policy)
    keep_joints(student, columns)
    with torch.no_grad():  # it has forgotten how to move
        student.denoise.action_out.weight.zero_()
        student.denoise.action_out.bias.zero_()
    frames = from_demonstrations([shown], checkpoint.spec, checkpoint.tokenizer_path)
    fit = Match(MatchConfig(steps=60, batch=16, rate=3e-3), student, policy, frames, tmp_path, columns)

    def velocity() -> float:
        with torch.no_grad():
            losses = fit.losses(np.random.default_rng(9), torch.Generator().manual_seed(9))
        return float(losses["velocity"])

    before = velocity()
    fit.train(100)
    assert velocity() < 0.4 * before


def test_an_interrupted_run_goes_on_to_the_same_student(teacher, shown, tmp_path):
    class Stop(Exception):
        pass

    told = []

    def stop(fraction, what):
        told.append(what.startswith("training"))
        if sum(told) == 54:
            raise Stop

    whole = make(teacher, shown, tmp_path / "whole", steps=56, batch=4)
    with pytest.raises(Stop):
        make(teacher, shown, tmp_path / "cut", steps=56, batch=4, progress=stop)
    assert not (tmp_path / "cut").exists()
    resumed = []
    again = make(teacher, shown, tmp_path / "cut", steps=56, batch=4, progress=lambda f, what: resumed.append(what))
    assert sum(what.startswith("training") for what in resumed) == 6, "what was saved at step 50 is not done again"
    assert again.action_error_rel == pytest.approx(whole.action_error_rel, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"joints": ["d_joint"]}, DistillError, "moves no joint 'd_joint', .*did you mean"),
        ({"size": 0.0}, DistillError, "size is 0, allowed is above 0, to 1"),
        ({"size": 1.5}, DistillError, "size is 1.5"),
        ({"size": 0.01}, DistillError, "smaller than it can be made"),
        ({"demonstrations": []}, DistillError, "no demonstrations"),
        ({"steps": 0}, DistillError, "training is 0 steps"),
        ({"instructions": ["*blue*"]}, DemonstrationError, "no demonstration in .* has an instruction like '\\*blue"),
    ],
)
def test_what_cannot_be_had_is_an_error_before_training(teacher, shown, tmp_path, options, error, said, monkeypatch):
    from vla_edge.learn import fit

    monkeypatch.setattr(fit.Fit, "update", lambda self: pytest.fail("training has begun"))
    with pytest.raises(error, match=said):
        make(teacher, shown, tmp_path / "student", **options)
    assert not list(tmp_path.iterdir())


def test_demonstrations_of_other_joints_or_chunks_are_refused(teacher, shown, tmp_path):
    for change, said in (({"joint_names": ["x", "y", "z"]}, "the policy moves b_joint"), ({}, "recording.json")):
        other = tmp_path / said
        other.mkdir()
        (other / "shard-0000.npz").write_bytes((shown / "shard-0000.npz").read_bytes())
        if change:
            (other / "recording.json").write_text(json.dumps({"dt": 0.05, **change}))
        with pytest.raises(DemonstrationError, match=said):
            make(teacher, other, tmp_path / "student")
    with np.load(shown / "shard-0000.npz") as arrays:
        shard = dict(arrays)
    other = tmp_path / "short"
    other.mkdir()
    (other / "recording.json").write_text((shown / "recording.json").read_text())
    np.savez_compressed(other / "shard-0000.npz", **{**shard, "action": shard["action"][:, :5]})
    with pytest.raises(DemonstrationError, match="show 5 points at a time and the policy gives 8"):
        make(teacher, other, tmp_path / "student")


def test_an_output_that_is_there_is_left_alone(teacher, shown, tmp_path):
    (tmp_path / "student").mkdir()
    with pytest.raises(DistillError, match="exists already"):
        make(teacher, shown, tmp_path / "student")


def test_the_smallest_share_that_is_enough_is_found():
    policy = tiny_policy()
    whole = parameters(policy)
    assert channel_share(policy, 1.0, whole) == 0.0
    shares = [channel_share(policy, size, whole) for size in (0.9, 0.7, 0.5)]
    assert shares == sorted(shares) and len(set(shares)) == 3
    assert joint_columns(tiny_spec(), []) == [0, 1, 2] and joint_columns(tiny_spec(), ["[bc]_*"]) == [0, 2]
