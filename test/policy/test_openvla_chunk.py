"""The chunk that calibration differentiates is the one the robot gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_edge.engine.runner import Runner, RunnerError
from vla_edge.learn.frames import from_observations
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity" / "openvla"


def loaded(name: str):
    checkpoint = load_checkpoint(SAVED / name / "checkpoint")
    return checkpoint, load_policy(checkpoint)


def observation(spec) -> Observation:
    rng = np.random.default_rng(5)
    images = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), dtype=np.uint8) for c in spec.cameras}
    joints = JointState(0, spec.read_names, rng.normal(0, 0.3, len(spec.read_names)))
    return Observation(0, images, joints, "touch the red cube")


@pytest.mark.parametrize("name", ["openvla", "oft"])
def test_the_differentiable_chunk_is_the_runners_and_reaches_every_layer(name):
    checkpoint, policy = loaded(name)
    spec = checkpoint.spec
    if name == "openvla":
        policy.prefill.head.weight.data *= 1e4  # so that the mean of the bins is the likeliest of them
    expected = Runner.from_policy(policy, checkpoint).infer(observation(spec)).chunk.positions
    frames = from_observations([observation(spec)], spec, checkpoint.tokenizer_path)
    chunk = frames.chunk_of(policy, None, 1)
    np.testing.assert_allclose(spec.action.unnormalize(chunk[0].detach().numpy()), expected, atol=2e-3)

    if name == "openvla":
        policy.prefill.head.weight.data /= 1e4
        chunk = frames.chunk_of(policy, None, 1)
    chunk.square().sum().backward()
    stages = {stage.name: stage.module for stage in policy.stages() if stage.shares is None}
    for stage, module in stages.items():
        for path, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear):
                assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0, f"{stage}.{path}"


def test_a_policy_without_a_flow_takes_one_step_and_no_noise_matters():
    checkpoint, policy = loaded("oft")
    runner = Runner.from_policy(policy, checkpoint)
    assert runner.num_steps == 1 and runner.description()["num_steps"] == 1
    with pytest.raises(RunnerError, match="no flow whose steps could be chosen"):
        runner.set_num_steps(2)
    first, second = (runner.infer(observation(checkpoint.spec), seed=seed).chunk.positions for seed in (1, 2))
    np.testing.assert_array_equal(first, second)


def test_what_was_decoded_before_leaves_no_trace_in_the_cache():
    checkpoint, policy = loaded("openvla")
    used, fresh = Runner.from_policy(policy, checkpoint), Runner.from_policy(policy, checkpoint)
    used.infer(Observation(0, observation(checkpoint.spec).images, observation(checkpoint.spec).joints, "push the ball now"))
    seen = observation(checkpoint.spec)
    np.testing.assert_array_equal(used.infer(seen).chunk.positions, fresh.infer(seen).chunk.positions)
