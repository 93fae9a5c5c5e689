"""Students of policies that write tokens, or give actions at once: checkpoints in their teacher's layout."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from openvla_subject import SAVED, observations, write_demonstrations

from vla_edge.compress.calibrate import collect
from vla_edge.engine.build import build
from vla_edge.engine.runner import Runner
from vla_edge.learn import distill as distilling
from vla_edge.learn.distill import DistillError, distill
from vla_edge.learn.frames import from_demonstrations
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.openvla_student import keep_joints, write
from vla_edge.policy.preprocess import ObservationError
from vla_edge.sim.demonstrations import DemonstrationError

OPENVLA, OFT = SAVED / "openvla" / "checkpoint", SAVED / "oft" / "checkpoint"
FRAMES = 24
JOINTS = tuple(f"joint_{index}" for index in (3, 0, 1, 2, 4, 5, 6))  # in another order than the policy's
STATES = tuple(f"state_{index}" for index in range(8))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Four episodes, red and ball in turn, with pictures as the camera's crop has them and eight points a chunk."""
    return write_demonstrations(tmp_path_factory.mktemp("shown"), (*JOINTS, *STATES), FRAMES)


@pytest.fixture
def one_camera(tmp_path):
    """A copy of OFT that looks through one camera, as demonstrations do: no weight depends on how many there are."""
    directory = shutil.copytree(OFT, tmp_path / "oft")
    facts = json.loads((directory / "vla_edge.json").read_text())
    del facts["cameras"]["wrist"]
    (directory / "vla_edge.json").write_text(json.dumps(facts))
    return directory


def make(teacher, shown, output, **options):
    # the table of all words is most of so small a policy
    return distill(teacher, output, **{"size": 0.96, "demonstrations": [shown], "steps": 3, "batch": 4, **options})


def test_a_student_is_a_checkpoint_of_its_teachers_layout_and_becomes_an_engine(shown, tmp_path):
    made = make(OPENVLA, shown, tmp_path / "student")
    student = load_policy(load_checkpoint(made.directory))
    assert sum(p.numel() for p in student.parameters()) == made.parameters <= 0.96 * made.teacher_parameters
    assert made.frames == FRAMES and np.isfinite(made.action_error_rel) and made.action_error_rel > 0
    assert {path.name for path in made.directory.iterdir()} == {path.name for path in OPENVLA.iterdir()}
    hidden = student.prefill.layers[0].mlp.up.out_features
    config = json.loads((made.directory / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] == hidden < 40
    assert [path.name for path in tmp_path.iterdir()] == ["student"], "nothing of the work is left"
    seen = observations(student_spec := load_checkpoint(made.directory).spec, 12)
    data = collect(seen, "random observations", frames=6, held_out=4)
    engine = Runner.from_bundle(build(made.directory, "fp32", "onnxruntime", tmp_path / "bundle", data))
    policy = Runner.from_checkpoint(made.directory)
    for observation in data.held_out:
        np.testing.assert_allclose(*(r.infer(observation).chunk.positions for r in (engine, policy)), atol=2e-3)
    assert student_spec.joint_names == made.joints == load_checkpoint(OPENVLA).spec.joint_names


@pytest.mark.parametrize("teacher", [OPENVLA, OFT], ids=["openvla", "oft"])
def test_what_is_written_is_what_was_read(teacher, tmp_path):
    """Every value that is used comes back, whatever its name and shape in the files; what is not used stays."""
    checkpoint = load_checkpoint(teacher)
    policy = load_policy(checkpoint)
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.add_(0.01 * (number + 1))
        if not policy.config.head_hidden:  # one tensor in the file
            end = policy.config.vocabulary - 64
            policy.prefill.embedding.weight[end - 256 : end] = policy.decode.words.weight
            policy.decode.head.weight.copy_(policy.prefill.head.weight)
    again = load_policy(load_checkpoint(write(tmp_path / "again", policy, checkpoint.spec, checkpoint)))
    for name, value in policy.state_dict().items():
        # half of the files are in bfloat16
        torch.testing.assert_close(again.state_dict()[name], value, rtol=2**-8, atol=1e-6, msg=name)
    for path in teacher.glob("*.json"):
        assert json.loads(path.read_text()).keys() == json.loads((tmp_path / "again" / path.name).read_text()).keys()


def test_fewer_joints_are_fewer_tokens(shown, tmp_path):
    made = make(OPENVLA, shown, tmp_path / "student", size=1.0, joints=["joint_[14]"], instructions=["*red*"])
    assert made.joints == ("joint_1", "joint_4") and made.frames == FRAMES // 2
    spec, whole = load_checkpoint(made.directory).spec, load_checkpoint(OPENVLA).spec
    for name, values in spec.action.statistics.items():
        assert values == tuple(whole.action.statistics[name][index] for index in (1, 4))
    assert Runner.from_checkpoint(made.directory).infer(observations(spec, 1)[0]).chunk.positions.shape == (1, 2)


def test_a_policy_of_the_first_joints_chooses_the_tokens_it_chose_before():
    """No token depends on those after it, so leaving the last joints out changes nothing of the first."""
    checkpoint = load_checkpoint(OPENVLA)
    whole, part = load_policy(checkpoint), load_policy(checkpoint)
    keep_joints(part, [0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    tokens, mask = torch.randint(3, 30, (1, 64), generator=generator), torch.arange(64)[None] < 20
    image_tokens = torch.randn(1, whole.config.image_tokens, 16, generator=generator)
    with torch.no_grad():
        ours, theirs = (policy.greedy(image_tokens, tokens, mask) for policy in (part, whole))
    torch.testing.assert_close(ours, theirs[:, :3])


def test_demonstrations_are_seen_as_the_camera_would_show_them(shown):
    """Pictures stretched, actions the first of longer chunks, joints by name."""
    checkpoint = load_checkpoint(OPENVLA)
    spec = checkpoint.spec
    frames = from_demonstrations([shown], spec, checkpoint.tokenizer_path)
    assert frames.images.shape == (FRAMES, 1, 3, 28, 28) and frames.actions.shape == (FRAMES, 1, 7)
    from vla_edge.learn.frames import from_observations

    same = from_observations(observations(spec, FRAMES, seed=3), spec, checkpoint.tokenizer_path)
    assert (frames.images == same.images).all()
    with np.load(shown / "shard-0000.npz") as shard:
        columns = [JOINTS.index(name) for name in spec.joint_names]
        wanted = spec.action.normalize(shard["action"][:, :1, columns])
    np.testing.assert_allclose(frames.actions, wanted, atol=1e-5)


@pytest.mark.slow
def test_a_student_of_a_policy_whose_actions_come_at_once(shown, one_camera, tmp_path):
    made = make(one_camera, shown, tmp_path / "student")
    again = load_policy(load_checkpoint(made.directory))
    assert sum(p.numel() for p in again.parameters()) == made.parameters < made.teacher_parameters
    assert Runner.from_checkpoint(made.directory).infer(observations(load_checkpoint(made.directory).spec, 1)[0])


def refuse(monkeypatch) -> None:
    from vla_edge.learn import fit

    monkeypatch.setattr(fit.Fit, "update", lambda self: pytest.fail("training has begun"))
    monkeypatch.setattr(distilling, "_shrink", lambda *_: pytest.fail("work has begun"))


def test_what_cannot_be_had_is_an_error_before_training(shown, one_camera, tmp_path, monkeypatch):
    refuse(monkeypatch)
    output = tmp_path / "student"
    with pytest.raises(DistillError, match="head reads what was found for all joints together"):
        make(one_camera, shown, output, joints=["joint_1"])
    with pytest.raises(DistillError, match="is a pi0; students are made of the families smolvla, openvla"):
        make(SAVED.parent / "pi" / "pi0" / "checkpoint", shown, output)
    with pytest.raises(DistillError, match="smaller than it can be made"):
        make(OPENVLA, shown, output, size=0.5)
    with pytest.raises(DemonstrationError, match="of one camera, and the policy takes 2"):
        make(OFT, shown, output)
    assert not output.exists()


def test_demonstrations_that_are_not_the_policys_are_refused(shown, one_camera, tmp_path, monkeypatch):
    refuse(monkeypatch)
    with np.load(shown / "shard-0000.npz") as arrays:
        shard = dict(arrays)

    def other(name: str, names=(*JOINTS, *STATES), dt=0.05, **changes):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recording.json").write_text(json.dumps({"joint_names": names, "dt": dt}))
        np.savez_compressed(tmp_path / name / "shard-0000.npz", **{**shard, **changes})
        return tmp_path / name

    small = other("small", images=shard["images"][:, :20, :20])
    with pytest.raises(ObservationError, match="stored as 20x20 pixels"):
        make(OPENVLA, small, tmp_path / "student")
    width = len(JOINTS)
    moved = other("moved", JOINTS, state=shard["state"][:, :width], action=shard["action"][..., :width])
    with pytest.raises(DemonstrationError, match="the policy reads state_0"):
        make(one_camera, moved, tmp_path / "student")
    short = other("short", action=shard["action"][:, :3])
    with pytest.raises(DemonstrationError, match="show 3 points at a time and the policy gives 8"):
        make(one_camera, short, tmp_path / "student")
    with pytest.raises(DemonstrationError, match="every 0.1 s and the policy gives them every 0.05 s"):
        make(OPENVLA, other("slow", dt=0.1), tmp_path / "student")
