"""pi0 and pi0.5, from an observation to the action chunk, give what their originals give from the same files.

Each directory below pi/ holds a checkpoint that LeRobot 0.4.4 saved, or openpi's PyTorch port, and what that made of
three observations with it (tools/parity/generate_pi.py, doc/parity.md). No number here comes from the code under test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from saved import SavedReference

from vla_edge.policy.checkpoint import load_checkpoint
from vla_edge.policy.preprocess import Preprocessor
from vla_edge.policy.spec import NormalizationMode
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import Observation

REFERENCES = Path(__file__).parent / "pi"
VARIANTS = sorted(path.name for path in REFERENCES.iterdir())
OBSERVATIONS = range(3)
TOLERANCE = 1e-4


class Reference(SavedReference):
    """In as many flow steps as its original took."""

    def __init__(self, name: str):
        super().__init__(REFERENCES / name)
        if "num_steps" in self._arrays:
            self.runner.set_num_steps(int(self._arrays["num_steps"]))

    def observation(self, index: int) -> Observation:
        return Observation(0, self.frames(index), self.joints(index), str(self._arrays["tasks"][index]))

    def actions(self, index: int) -> np.ndarray:
        """The original's, as absolute targets."""
        offset = self[index, "positions"] if self.spec.relative_actions else 0.0
        return self[index, "actions"][0].astype(np.float64) + offset


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request) -> Reference:
    return Reference(request.param)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_preprocessing_gives_the_originals_images_tokens_and_state(reference, index):
    spec = reference.spec
    tokenizer = InstructionTokenizer.of(spec, reference.checkpoint.tokenizer_path)
    ours = Preprocessor(spec, tokenizer)(reference.observation(index))
    for camera in spec.cameras:
        expected = reference[index, f"image.{camera.name}"]
        kept = slice(None, None, camera.height // expected.shape[2])  # of large pictures every 16th row is kept
        np.testing.assert_allclose(ours[f"image.{camera.name}"][:, :, kept], expected, atol=2e-6, rtol=0)
    tokens, mask = reference[index, "tokens"], reference[index, "mask"]
    np.testing.assert_array_equal(ours["lang_tokens"][ours["lang_mask"]], tokens[mask])
    assert ours["lang_mask"].sum() == mask.sum() > 0
    state = reference[index, "state"]
    np.testing.assert_allclose(ours["state"][:, : state.shape[1]], state, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_chunk_is_the_originals_from_the_same_noise(reference, index):
    chunk = reference.runner.infer(reference.observation(index), noise=reference[index, "noise"]).chunk
    np.testing.assert_allclose(chunk.positions, reference.actions(index), atol=TOLERANCE, rtol=0)
    # and the instruction and the picture matter by far more than that
    other = np.abs(reference.actions(index) - reference.actions((index + 1) % len(OBSERVATIONS)))
    assert other.max() > 1000 * TOLERANCE


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_one_flow_step_is_the_originals_velocity(reference, index):
    inputs = [stage for stage in reference.runner.stage_inputs(reference.observation(index)) if stage[0] == "denoise"]
    velocity = reference.runner.stages["denoise"].run(inputs[0][1] | {"x": reference[index, "noise"]})["velocity"]
    np.testing.assert_allclose(velocity, reference[index, "velocity"], atol=TOLERANCE, rtol=0)


def test_every_way_the_originals_normalize_is_covered():
    specs = [load_checkpoint(REFERENCES / name / "checkpoint").spec for name in VARIANTS]
    modes = {normalization.mode for spec in specs for normalization in (spec.state, spec.action)}
    assert modes >= set(NormalizationMode) - {NormalizationMode.QUANTILE10}
