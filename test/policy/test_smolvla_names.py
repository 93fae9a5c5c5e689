"""Every parameter of ours has a place in LeRobot's file, and its own."""

from __future__ import annotations

import pytest
import torch
from small import small_policy

from vla_edge.policy.smolvla_names import from_lerobot, to_lerobot


def test_there_and_back_every_parameter_is_the_same():
    policy = small_policy()
    state = from_lerobot(to_lerobot(policy), policy)
    assert state.keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_no_two_parameters_share_a_place():
    policy = small_policy()
    with torch.no_grad():
        for index, parameter in enumerate(policy.parameters()):
            parameter.fill_(index + 1.0)
    found = torch.cat([tensor.flatten() for tensor in to_lerobot(policy).values()]).unique()
    assert set(range(1, len(list(policy.parameters())) + 1)) <= set(found.int().tolist())


def test_the_action_half_of_the_time_mlp_comes_first():
    policy = small_policy()
    joint = to_lerobot(policy)["model.action_time_mlp_in.weight"]
    width = policy.config.expert_width
    assert torch.equal(joint[:, :width], policy.denoise.mlp_in.weight)
    assert torch.equal(joint[:, width:], policy.time.mlp_in.weight)


def test_the_patch_embedding_is_lerobots_convolution():
    policy = small_policy()
    kernel = to_lerobot(policy)["model.vlm_with_expert.vlm.model.vision_model.embeddings.patch_embedding.weight"]
    image = torch.randn(1, 3, 16, 16)
    convolved = torch.nn.functional.conv2d(image, kernel, stride=4).flatten(2).transpose(1, 2)
    patches = torch.nn.functional.unfold(image, 4, stride=4).transpose(1, 2)
    ours = torch.nn.functional.linear(patches, policy.vision.encoder.patch_embedding.weight)
    torch.testing.assert_close(ours, convolved, atol=1e-5, rtol=1e-5)


def test_a_tensor_that_is_missing_is_named_as_lerobot_names_it():
    policy = small_policy()
    tensors = to_lerobot(policy)
    name = "model.vlm_with_expert.lm_expert.layers.1.self_attn.k_proj.weight"
    del tensors[name]
    with pytest.raises(KeyError, match=name.replace(".", r"\.")):
        dict(from_lerobot(tensors, policy))
