"""Observations become the network's tensors by name and in the training's arithmetic; others are refused."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from small import JOINTS, small_spec
from torch.nn.functional import interpolate

from vla_edge.policy.checkpoint import load_checkpoint
from vla_edge.policy.preprocess import (
    ObservationError,
    Postprocessor,
    Preprocessor,
    letterbox,
    resample,
    resize_with_pad,
    stretch_linear,
    stretch_torch,
)
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import JointState, Observation

POSITIONS = np.array([1.0, -0.5, 0.0])


@pytest.fixture
def preprocess(written) -> Preprocessor:
    checkpoint = load_checkpoint(written)
    tokenizer = InstructionTokenizer(checkpoint.tokenizer_path, checkpoint.spec.tokenizer_max_length)
    return Preprocessor(checkpoint.spec, tokenizer)


def observe(names=JOINTS, positions=POSITIONS, **images) -> Observation:
    frames = {"head": pixels(60, 80), "wrist": pixels(20, 24)} | images
    return Observation(0, frames, JointState(0, names, positions), "touch the red cube")


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("seed", range(20))
def test_resizing_is_torchs_bilinear_interpolation_at_any_size_and_aspect(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(size) for size in rng.integers(9, 90, 2))
    target_height, target_width = (int(size) for size in rng.integers(8, 60, 2))
    image = pixels(height, width, seed)
    ratio = max(width / target_width, height / target_height)
    size = (int(height / ratio), int(width / ratio))
    scaled = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(scaled, size=size, mode="bilinear", align_corners=False)
    padding = (target_width - size[1], 0, target_height - size[0], 0)
    expected = torch.nn.functional.pad(resized, padding) * 2 - 1
    # source coordinates up to 90 are rounded to float32, and noise has the steepest slopes there are
    np.testing.assert_allclose(resize_with_pad(image, target_height, target_width), expected.numpy(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("step, size", [(1, 16), (3, 16), (5, 96), (7, 10)])
def test_sampling_at_an_odd_scale_is_what_interpolation_gives(step, size):
    image = pixels(step * size, step * size)
    interpolated = cv2.resize(image.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    expected = interpolated.transpose(2, 0, 1)[None] * (2 / 255) - 1
    np.testing.assert_allclose(resize_with_pad(image, size, size), expected, atol=1e-6, rtol=0)


def test_at_an_odd_scale_no_interpolation_is_run(monkeypatch):
    monkeypatch.setattr(cv2, "resize", None)
    resize_with_pad(pixels(480, 480), 96, 96)
    with pytest.raises(TypeError):
        resize_with_pad(pixels(480, 480), 120, 120)


def test_a_wide_image_is_padded_black_at_the_top():
    image = np.full((20, 40, 3), 255, np.uint8)
    out = resize_with_pad(image, 16, 16)[0]
    assert (out[:, :8] == -1).all() and (out[:, 8:] == 1).all()


def test_the_crop_is_taken_before_resizing(preprocess):
    frame = np.zeros((60, 80, 3), np.uint8)
    frame[6:54, 16:64] = 255
    assert (preprocess(observe(head=frame))["image.head"] == 1).all()


def test_tensors_are_complete_and_of_the_stages_types(preprocess):
    tensors = preprocess(observe())
    assert {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()} == {
        "image.head": ((1, 3, 16, 16), "float32"),
        "image.wrist": ((1, 3, 16, 16), "float32"),
        "lang_tokens": ((1, 12), "int64"),
        "lang_mask": ((1, 12), "bool"),
        "state": ((1, 5), "float32"),
    }


def test_state_is_matched_by_name_normalized_and_padded(preprocess):
    # (1 - 0.5) / 0.5, (-0.5 + 0.25) / 0.25, a joint that never moved, padding
    expected = [[1.0, -1.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(preprocess(observe())["state"], expected, atol=1e-6)
    shuffled = observe(("c_joint", "other_joint", "b_joint", "a_joint"), np.array([0.0, 9.0, 1.0, -0.5]))
    np.testing.assert_allclose(preprocess(shuffled)["state"], expected, atol=1e-6)


@pytest.mark.parametrize(
    "observation, expected",
    [
        (observe(JOINTS[:2], POSITIONS[:2]), "lacks c_joint; the policy needs every joint"),
        (observe(("x", "y", "z")), "lacks b_joint, a_joint, c_joint; "),
        (observe(positions=[0.0, np.nan, 0.0]), "of a_joint is not finite; check"),
        (observe(positions=[0.0, 0.0, -np.inf]), "of c_joint is not finite; check"),
        (observe(head=pixels(60, 81)), r"'head' gave uint8 of shape \(60, 81, 3\), .*\(60, 80, 3\); set the camera"),
        (observe(head=pixels(80, 60)), r"\(80, 60, 3\)"),
        (observe(head=pixels(60, 80)[..., 0]), r"\(60, 80\)"),
        (observe(head=pixels(60, 80).astype(np.float32)), "'head' gave float32"),
        (observe(head=np.dstack([pixels(60, 80), pixels(60, 80)[..., :1]])), r"\(60, 80, 4\)"),
        (Observation(0, {"head": pixels(60, 80)}, JointState(0, JOINTS, POSITIONS), "touch"), "no camera 'wrist'"),
    ],
    ids=["one joint", "all joints", "nan", "inf", "width", "turned", "grey", "float", "alpha", "camera"],
)  # fmt: skip
def test_what_the_policy_was_not_trained_on_is_refused(preprocess, observation, expected):
    with pytest.raises(ObservationError, match=expected):
        preprocess(observation)


def test_relative_actions_are_added_to_the_measured_positions_by_name():
    actions = np.zeros((1, 4, 6), np.float32)
    actions[0, :, 0] = [-1, 0, 1, 2]  # of (-1, 2): the middle is 0.5, half the range 1.5
    actions[..., 3:] = 77.0  # padding
    joints = JointState(0, ("c_joint", "b_joint", "a_joint"), [0.25, 1.0, -0.5])
    targets = Postprocessor(small_spec())(actions, joints)
    assert targets.shape == (4, 3) and targets.dtype == np.float64
    np.testing.assert_allclose(targets[:, 0], np.array([-1.0, 0.5, 2.0, 3.5]) + 1.0, atol=1e-12)
    np.testing.assert_allclose(targets[:, 1], -0.5)
    np.testing.assert_allclose(targets[:, 2], 0.25, atol=1e-6)


def test_absolute_actions_do_not_depend_on_the_measured_positions():
    actions = np.zeros((1, 4, 6), np.float32)
    post = Postprocessor(small_spec(relative_actions=False))
    np.testing.assert_allclose(post(actions, JointState(0, JOINTS, POSITIONS))[:, 0], 0.5)


@pytest.mark.parametrize("relative", [True, False])
def test_targets_become_the_actions_they_would_have_come_from(relative):
    post, joints = Postprocessor(small_spec(relative_actions=relative)), JointState(0, JOINTS, POSITIONS)
    targets = np.random.default_rng(0).normal(size=(4, 3))
    actions = np.zeros((1, 4, 6), np.float32)
    actions[0, :, :3] = post.inverse(targets, joints)
    np.testing.assert_allclose(post(actions, joints), targets, atol=1e-6)


def test_relative_actions_without_a_measured_joint_are_refused():
    with pytest.raises(ObservationError, match="lacks a_joint"):
        Postprocessor(small_spec())(np.zeros((1, 4, 6), np.float32), JointState(0, ("b_joint", "c_joint"), [0.0, 0.0]))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (20, 30), (480, 640), (28, 28)])
def test_resampling_is_pillows_pixel_by_pixel(height, width):
    from PIL import Image

    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for name, method in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        expected = np.asarray(Image.fromarray(image).resize((28, 21), method))
        np.testing.assert_array_equal(resample(image, 21, 28, name), expected)


def test_a_letterboxed_picture_lies_in_the_middle_of_black():
    seen = letterbox(pixels(40, 80), 32, 32)[0]
    assert (seen[:, :8] == -1).all() and (seen[:, 24:] == -1).all() and (seen[:, 8:24] > -1).any()


@pytest.mark.parametrize("size", [(40, 60), (20, 24), (15, 47)])
def test_pictures_are_stretched_as_pytorch_does(size):
    drawn = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = torch.from_numpy(drawn).permute(2, 0, 1)[None].contiguous()
    whole = interpolate(picture, (28, 28), mode="bicubic", antialias=True)
    np.testing.assert_array_equal(np.rint((stretch_torch(drawn, 28, 28) + 1) * 127.5), whole.numpy())
    shares = interpolate(picture / 255, (28, 28), mode="bilinear", antialias=True).mul(255).to(torch.uint8)
    apart = np.abs(np.rint((stretch_linear(drawn, 28, 28) + 1) * 127.5) - shares.numpy())
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02  # cut off where float32 lacks a hair
