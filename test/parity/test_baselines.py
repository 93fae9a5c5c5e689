"""ACT and diffusion policies, from observations to the action chunk, give what LeRobot gives from the same files.

Each directory below baselines/ holds a checkpoint that LeRobot 0.4.4 saved and what it made of three observations with
it (tools/parity/generate_baselines.py, doc/parity.md). No number here comes from the code under test.
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
from vla_edge.types import NANOSECONDS, Observation

REFERENCES = Path(__file__).parent / "baselines"
VARIANTS = sorted(path.name for path in REFERENCES.iterdir())
OBSERVATIONS = range(3)
TOLERANCE = 1e-4


class Reference(SavedReference):
    """Of a policy without words."""

    def __init__(self, name: str):
        super().__init__(REFERENCES / name)

    def observation(self, index: int) -> Observation:
        """With those before it."""
        stamp = round(index * self.spec.dt * NANOSECONDS)
        before = (*self.observation(index - 1).before, self.observation(index - 1)) if index else ()
        return Observation(stamp, self.frames(index), self.joints(index, stamp), "", before)

    def actions(self, index: int) -> np.ndarray:
        """LeRobot's, as absolute targets."""
        return self[index, "actions"][0].astype(np.float64) + self[index, "positions"]

    def infer(self, index: int) -> np.ndarray:
        return self.runner.infer(self.observation(index), noise=self._arrays.get(f"{index}.noise")).chunk.positions


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request) -> Reference:
    return Reference(request.param)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_preprocessing_gives_lerobots_images_and_state(reference, index):
    spec = reference.spec
    ours = Preprocessor(spec, InstructionTokenizer.of(spec, None))(reference.observation(index))
    # LeRobot crops what it has scaled, inside the network
    height, width = reference[index, "frame.head"].shape[:2]
    for camera in spec.cameras:
        if camera.crop[2:] == (height, width):
            expected = reference[index, f"image.{camera.name}"]
            np.testing.assert_allclose(ours[f"image.{camera.name}"][-1:, :, ::16], expected, atol=3e-6, rtol=0)
    np.testing.assert_allclose(ours["state"][-1:], reference[index, "state"], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_chunk_is_lerobots_from_the_same_noise(reference, index):
    expected = reference.actions(index)
    np.testing.assert_allclose(reference.infer(index), expected, atol=TOLERANCE, rtol=0)
    # and the picture and the state matter by far more than that
    other = np.abs(expected - reference.actions((index + 1) % len(OBSERVATIONS)))
    assert other.max() > 1000 * TOLERANCE


def test_every_way_lerobot_normalizes_is_covered():
    specs = [load_checkpoint(REFERENCES / name / "checkpoint").spec for name in VARIANTS]
    modes = {normalization.mode for spec in specs for normalization in (spec.state, spec.action)}
    assert modes >= set(NormalizationMode) - {NormalizationMode.QUANTILE10}
