"""SmolVLA, from an observation to the action chunk, gives what LeRobot's own gives from the same files.

Each directory below smolvla/ holds a checkpoint that LeRobot 0.4.4 saved and what LeRobot made of three observations
with it (tools/parity/generate_smolvla.py, doc/parity.md). No number here comes from the code under test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from saved import SavedReference

from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.checkpoint_files import read_tensors
from vla_edge.policy.checkpoint_writer import SPECIAL_TOKENS, write_checkpoint
from vla_edge.policy.preprocess import Preprocessor
from vla_edge.policy.smolvla_names import from_lerobot, to_lerobot
from vla_edge.policy.spec import NormalizationMode
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import Observation

REFERENCES = Path(__file__).parent / "smolvla"
VARIANTS = ("interleaved", "half_expert", "self_attention")  # "bfloat16" has a test of its own
OBSERVATIONS = range(3)
# float32 rounding, summed in another order; embeddings reach 20, actions 6 (measured: 1.8e-5 and 4.4e-5)
EMBEDDING_TOLERANCE, ACTION_TOLERANCE = 5e-5, 1e-4


class Reference(SavedReference):
    """What LeRobot made of a checkpoint, and our policy and runner of the same files."""

    def __init__(self, name: str):
        super().__init__(REFERENCES / name)

    def observation(self, index: int) -> Observation:
        return Observation(0, self.frames(index), self.joints(index), str(self._arrays["tasks"][index]))

    def inputs(self, index: int) -> dict[str, np.ndarray]:
        tokenizer = InstructionTokenizer(
            self.checkpoint.tokenizer_path, self.spec.tokenizer_max_length, self.spec.prompt
        )
        return Preprocessor(self.spec, tokenizer)(self.observation(index))

    @torch.no_grad()
    def image_embeddings(self, index: int) -> np.ndarray:
        """The part of the prefix that comes from images, markers included."""
        inputs = self.inputs(index)
        images = [self.policy.vision(torch.from_numpy(inputs[f"image.{c.name}"]))[0] for c in self.spec.cameras]
        return self.policy.prefix._with_markers(torch.cat(images, dim=1)).numpy()

    def actions(self, index: int) -> np.ndarray:
        """LeRobot's, as absolute targets."""
        offset = self[index, "positions"] if self.spec.relative_actions else 0.0
        return self[index, "actions"][0].astype(np.float64) + offset


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request) -> Reference:
    return Reference(request.param)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_preprocessing_gives_lerobots_images_tokens_and_state(reference, index):
    ours = reference.inputs(index)
    for camera in reference.spec.cameras:
        expected = reference[index, f"image.{camera.name}"]
        np.testing.assert_allclose(ours[f"image.{camera.name}"], expected, atol=2e-6, rtol=0)
    tokens, mask = reference[index, "tokens"], reference[index, "mask"]
    np.testing.assert_array_equal(ours["lang_tokens"][ours["lang_mask"]], tokens[mask])
    assert ours["lang_mask"].sum() == mask.sum() > 0
    np.testing.assert_allclose(ours["state"], reference[index, "state"], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_prefix_begins_with_lerobots_image_embeddings(reference, index):
    ours = reference.image_embeddings(index)
    expected = reference[index, "prefix"][:, : ours.shape[1]]
    np.testing.assert_allclose(ours, expected, atol=EMBEDDING_TOLERANCE, rtol=0)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_velocity_of_the_first_flow_step_is_lerobots(reference, index):
    stages, inputs = reference.runner.stages, reference.inputs(index)
    names = [f"image.{camera.name}" for camera in reference.spec.cameras]
    tokens = np.concatenate([stages["vision"].run({"image": inputs[name]})["image_tokens"] for name in names], axis=1)
    cache = stages["prefix"].run({**inputs, "image_tokens": tokens})
    condition = stages["time"].run({"time": np.ones(1, np.float32)})
    velocity = stages["denoise"].run({**cache, **condition, "x": reference[index, "noise"]})["velocity"]
    np.testing.assert_allclose(velocity, reference[index, "velocity"], atol=ACTION_TOLERANCE, rtol=0)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_chunk_is_lerobots_from_the_same_noise(reference, index):
    chunk = reference.runner.infer(reference.observation(index), noise=reference[index, "noise"]).chunk
    np.testing.assert_allclose(chunk.positions, reference.actions(index), atol=ACTION_TOLERANCE, rtol=0)
    # and the instruction and the picture matter by far more than that
    other = np.abs(reference.actions(index) - reference.actions((index + 1) % len(OBSERVATIONS)))
    assert other.max() > 1000 * ACTION_TOLERANCE


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_a_policy_on_a_pretrained_backbone_is_lerobots_but_for_bfloat16(index):
    reference = Reference("bfloat16")
    ours, expected = reference.image_embeddings(index), reference[index, "prefix"]
    expected = expected[:, : ours.shape[1]]
    assert _relative(ours, expected) < 0.015  # measured 0.0094
    chunk = reference.runner.infer(reference.observation(index), noise=reference[index, "noise"]).chunk
    motion = chunk.positions - reference[index, "positions"]
    assert _relative(motion, reference[index, "actions"][0]) < 0.05

    # read with the positions a float32 vision tower gets, it would be another policy
    weights = read_tensors(reference.checkpoint.weights[0], "torch")
    reference.policy.load_state_dict(from_lerobot(weights, reference.policy, torch.float32))
    assert _relative(reference.image_embeddings(index), expected) > 0.3


def test_every_way_lerobot_normalizes_is_covered():
    specs = [load_checkpoint(REFERENCES / name / "checkpoint").spec for name in VARIANTS]
    modes = {normalization.mode for spec in specs for normalization in (spec.state, spec.action)}
    assert modes == set(NormalizationMode)


def test_a_checkpoint_written_again_has_lerobots_tensors_and_the_same_policy(reference, tmp_path):
    saved = read_tensors(reference.checkpoint.weights[0], "torch")
    written = to_lerobot(reference.policy)
    positions = "model.vlm_with_expert.vlm.model.vision_model.embeddings.position_embedding.weight"
    assert saved.pop(positions).shape[1] == written.pop(positions).shape[1]
    # a backbone whose head is its table of words saves the head once, under either name
    head = "model.vlm_with_expert.vlm.lm_head.weight"
    saved.setdefault(head, saved["model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight"])
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in saved.items()}

    again = load_checkpoint(write_checkpoint(tmp_path / "again", reference.policy, reference.spec, _words(reference)))
    assert again.spec == reference.spec
    loaded = load_policy(again).state_dict()
    for name, tensor in reference.policy.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name


def _relative(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def _words(reference: Reference) -> list[str]:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(reference.checkpoint.tokenizer_path)).get_vocab()
    return sorted(vocabulary, key=vocabulary.get)[len(SPECIAL_TOKENS) :]
