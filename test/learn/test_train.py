import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_edge.learn import train
from vla_edge.learn.fit import TrainingError, schedule
from vla_edge.learn.train import TrainConfig, Trainer, reference_shapes
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.sim.demonstrations import DemonstrationError
from vla_edge.sim.worlds import world


def _weights(trainer):
    return {name: value.clone() for name, value in trainer.average.state_dict().items()}


def test_an_interrupted_run_goes_on_to_the_same_weights(make_trainer, short, tmp_path):
    whole = make_trainer(short, tmp_path / "whole")
    whole.train(save_every=100)

    first = make_trainer(short, tmp_path / "parts")
    for _ in range(2):
        first.update()
    first.save()
    second = make_trainer(short, tmp_path / "parts")
    assert second.step == 2
    second.train(save_every=100)
    expected, got = _weights(whole), _weights(second)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_training_leaves_a_checkpoint_that_loads_and_a_log(make_trainer, short, tmp_path):
    trainer = make_trainer(replace(short, steps=10), tmp_path)
    trainer.train(save_every=100)
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    loaded = checkpoint.spec
    assert replace(loaded, state=trainer.spec.state, action=trainer.spec.action) == trainer.spec
    np.testing.assert_allclose(loaded.state.affine(), trainer.spec.state.affine(), rtol=1e-6)
    np.testing.assert_allclose(loaded.action.affine(), trainer.spec.action.affine(), rtol=1e-6)
    assert loaded.relative_actions and len(loaded.joint_names) == 15
    policy = load_policy(checkpoint)
    for (name, value), other in zip(trainer.average.state_dict().items(), policy.state_dict().values()):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=name)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 10 and np.isfinite(rows[-1]["flow"])


def test_a_few_steps_on_one_batch_lower_both_losses(make_trainer, tmp_path):
    trainer = make_trainer(TrainConfig(steps=40, batch=16, draws=2, warmup=5), tmp_path)
    losses = [trainer.update() for _ in range(25)]
    first, last = losses[:5], losses[-5:]
    for name in ("flow", "pointer"):
        assert np.mean([row[name] for row in last]) < 0.95 * np.mean([row[name] for row in first]), name


def test_other_settings_do_not_go_on_with_a_run(make_trainer, short, tmp_path):
    make_trainer(short, tmp_path).save()
    with pytest.raises(TrainingError, match="rate.*choose another"):
        make_trainer(replace(short, rate=5e-4), tmp_path)


def test_a_damaged_run_is_named(make_trainer, short, tmp_path):
    make_trainer(short, tmp_path).save()
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="state.pt cannot be read"):
        make_trainer(short, tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run(make_trainer, short, tmp_path):
    trainer = make_trainer(short, tmp_path)
    with torch.no_grad():
        trainer.policy.vision.connector.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        trainer.update()


def test_the_learning_rate_warms_up_and_comes_down_to_zero():
    config = TrainConfig(steps=1000, warmup=100)
    rates = [schedule(step, config) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == pytest.approx(1) and rates[999] < 1e-4
    assert np.argmax(rates) in (99, 100) and (np.diff(rates[100:]) < 0).all()


def test_the_policy_is_of_the_world_that_was_recorded(recording, metaworld_recording, tmp_path):
    shown = world("metaworld")
    shapes = replace(
        reference_shapes(shown), vision_width=32, vision_hidden=64, vision_layers=1, text_width=64, text_hidden=64,
        heads=2, kv_heads=1, expert_width=48, expert_hidden=256, vision_heads=4,
    )  # fmt: skip
    trainer = Trainer(TrainConfig(steps=2, batch=8, draws=1, warmup=1), [metaworld_recording], tmp_path, shapes)
    trainer.train(save_every=2)
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.spec.joint_names == shown.joint_names and checkpoint.spec.cameras == (shown.camera,)
    assert (checkpoint.spec.chunk_size, checkpoint.spec.dt) == (shown.chunk, shown.dt)
    with pytest.raises(DemonstrationError, match="in one world; these demonstrations are of metaworld, tabletop"):
        Trainer(TrainConfig(), [recording, metaworld_recording], tmp_path / "both")


def test_no_demonstrations_end_the_command_with_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: .* holds no demonstrations; record them with"):
        train.main(["--demonstrations", str(tmp_path), "--out", str(tmp_path / "out")])
