"""GR00T N1.5 and N1.7, from an observation to the action chunk, give what LeRobot's port of them gives from the same files.

Each directory below groot/ and groot17/ holds a checkpoint as LeRobot 0.4.4 and 0.6.1 or Isaac-GR00T saves it and what the
port made of three observations with it (tools/parity/generate_groot.py and generate_groot17.py, doc/parity.md). No number
here comes from the code under test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from saved import SavedReference

from vla_edge.policy import groot17_layout, groot_layout
from vla_edge.policy.preprocess import Preprocessor
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import JointState, Observation

REFERENCES = Path(__file__).parent
VARIANTS = sorted(f"{path.parent.name}/{path.name}" for path in REFERENCES.glob("groot*/*"))
# of a family: what a picture is in the prompt, and how the backbone calls its number
PICTURES = {"groot": (groot_layout.IMAGE, "image_token_index"), "groot17": (groot17_layout.IMAGE, "image_token_id")}
OBSERVATIONS = range(3)
TOLERANCE = 1e-4
LEVEL = 2 / 255  # of a pixel


class Reference(SavedReference):
    """With the joints of the state, which may be others than the actions'."""

    def __init__(self, name: str):
        super().__init__(REFERENCES / name)

    def observation(self, index: int) -> Observation:
        names = self.spec.read_names
        order = np.random.default_rng(index).permutation(len(names))
        joints = JointState(0, [names[i] for i in order], self[index, "positions"][order])
        return Observation(0, self.frames(index), joints, str(self._arrays["tasks"][index]))

    def preprocessed(self, index: int) -> dict[str, np.ndarray]:
        tokenizer = InstructionTokenizer.of(self.spec, self.checkpoint.tokenizer_path)
        return Preprocessor(self.spec, tokenizer)(self.observation(index))

    def actions(self, index: int) -> np.ndarray:
        """The original's, as absolute targets; what N1.7's are offsets to, LeRobot has added."""
        offsets = self.spec.relative_actions and self.spec.family == "groot"
        offset = self[index, "positions"] if offsets else 0.0
        return self[index, "actions"][0].astype(np.float64) + offset

    def shown(self, index: int) -> dict[str, np.ndarray]:
        """The inputs of the prefix stage out of the original's pictures."""
        ours = self.preprocessed(index)
        pictures = [torch.from_numpy(self[index, f"image.{camera.name}"]) for camera in self.spec.cameras]
        with torch.no_grad():
            ours["image_tokens"] = torch.cat([self.policy.vision(picture)[0] for picture in pictures], dim=1).numpy()
        return ours


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request) -> Reference:
    return Reference(request.param)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_preprocessing_gives_the_originals_images_tokens_and_state(reference, index):
    ours = reference.preprocessed(index)
    for camera in reference.spec.cameras:
        expected = reference[index, f"image.{camera.name}"]
        apart = np.abs(ours[f"image.{camera.name}"] - expected)
        if camera.fit != "stretch_linear":
            assert apart.max() < 2e-6
        else:  # Isaac-GR00T cuts float32 off to whole values, where a hair decides
            assert apart.max() < 1.01 * LEVEL and (apart > 2e-6).mean() < 0.03
    # each picture is one token here, and there as many as it has
    word, number = PICTURES[reference.spec.family]
    tokens, image = reference[index, "tokens"][0], reference.checkpoint.backbone[number]
    collapsed = [token for before, token in zip([None, *tokens], tokens) if token != image or before != image]
    np.testing.assert_array_equal(ours["lang_tokens"][ours["lang_mask"]], collapsed)
    assert collapsed.count(image) == len(reference.spec.cameras) == reference.spec.prompt.count(word)
    np.testing.assert_allclose(ours["state"], reference[index, "state"], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_chunk_is_the_originals_from_the_same_noise(reference, index):
    observation, camera = reference.observation(index), reference.spec.cameras[0]
    if camera.fit != "stretch_linear":
        chunk = reference.runner.infer(observation, noise=reference[index, "noise"]).chunk.positions
    else:  # from the original's own pictures, a few pixels of which are a level brighter or darker
        chunk = seeing(reference, index)
    np.testing.assert_allclose(chunk, reference.actions(index), atol=TOLERANCE, rtol=0)
    # and the instruction and the picture matter by far more than that
    other = np.abs(reference.actions(index) - reference.actions((index + 1) % len(OBSERVATIONS)))
    assert other.max() > 1000 * TOLERANCE


def seeing(reference: Reference, index: int) -> np.ndarray:
    """The chunk, once the original's pictures lie in the loop's buffers."""
    runner = reference.runner
    prepared = runner._preprocess
    images = {f"image.{camera.name}": reference[index, f"image.{camera.name}"] for camera in reference.spec.cameras}
    runner._preprocess = lambda observation: prepared(observation) | images
    try:
        return runner.infer(reference.observation(index), noise=reference[index, "noise"]).chunk.positions
    finally:
        runner._preprocess = prepared


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_language_model_gives_the_originals_features(reference, index):
    prefix, ours = reference.policy.prefix, reference.shown(index)
    found = []
    handle = prefix.adapter_norm.register_forward_hook(lambda module, given, made: found.append(given[0]))
    try:
        with torch.no_grad():
            names = ("image_tokens", "lang_tokens", "lang_mask", "state")
            cache = prefix(*(torch.from_numpy(ours[name]) for name in names))
    finally:
        handle.remove()
    real = cache[2][0].bool().numpy()
    np.testing.assert_allclose(found[0].numpy()[:, real], reference[index, "features"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_one_flow_step_is_the_originals_velocity(reference, index):
    seeing(reference, index)
    inputs = next(tensors for name, tensors in reference.runner._loop.inputs(0, 0) if name == "denoise")
    velocity = reference.runner.stages["denoise"].run(inputs | {"x": reference[index, "noise"]})["velocity"]
    np.testing.assert_allclose(velocity, reference[index, "velocity"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 7, 10, 25, 50, 100])
def test_flow_times_fall_into_the_buckets_the_original_counts(steps):
    from vla_edge.policy.groot import TimeEncoder

    reference = Reference(VARIANTS[0])
    encoder: TimeEncoder = reference.policy.time
    for step in range(steps):
        bucket = int(step / float(steps) * 1000)
        moments = torch.tensor([1 - step / steps]), torch.tensor([1 - bucket / 1000])
        with torch.no_grad():
            ours, expected = (encoder(moment)[0] for moment in moments)
        assert torch.equal(ours, expected), (step, bucket)
