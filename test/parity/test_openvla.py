"""OpenVLA and OpenVLA-OFT, from an observation to the action, give what their authors' code gives from the same files.

Each directory below openvla/ holds a checkpoint of random weights and what that code made of three observations with it
(tools/parity/generate_openvla.py, doc/parity.md). No number here comes from the code under test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.preprocess import Preprocessor
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import JointState, Observation

REFERENCES = Path(__file__).parent / "openvla"
VARIANTS = ("openvla", "oft")
OBSERVATIONS = range(3)
TOLERANCE = 1e-4


class Reference:
    """One checkpoint, what its original made of it, and our runner of the same files."""

    def __init__(self, name: str):
        self.checkpoint = load_checkpoint(REFERENCES / name / "checkpoint")
        self.spec = self.checkpoint.spec
        self.runner = Runner.from_policy(load_policy(self.checkpoint), self.checkpoint)
        with np.load(REFERENCES / name / "reference.npz") as arrays:
            self._arrays = dict(arrays)

    def __getitem__(self, key: tuple[int, str]) -> np.ndarray:
        index, name = key
        return self._arrays[f"{index}.{name}"]

    def observation(self, index: int) -> Observation:
        # named in another order than the checkpoint's, as a robot might
        names = self.spec.read_names
        order = np.random.default_rng(index).permutation(len(names))
        joints = JointState(0, [names[i] for i in order], self[index, "positions"][order])
        frames = {camera.name: self[index, f"frame.{camera.name}"] for camera in self.spec.cameras}
        return Observation(0, frames, joints, str(self._arrays["tasks"][index]))


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request) -> Reference:
    return Reference(request.param)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_prompt_is_the_originals_and_ends_with_the_empty_word(reference, index):
    tokenizer = InstructionTokenizer.of(reference.spec, reference.checkpoint.tokenizer_path)
    tokens, mask = tokenizer(str(reference._arrays["tasks"][index]))
    assert tokens[mask].tolist() == [*reference[index, "tokens"][0].tolist(), 29871]


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_action_is_the_originals(reference, index):
    chunk = reference.runner.infer(reference.observation(index)).chunk
    np.testing.assert_allclose(chunk.positions, reference[index, "actions"], atol=TOLERANCE, rtol=0)
    other = np.abs(reference[index, "actions"] - reference[(index + 1) % len(OBSERVATIONS), "actions"])
    assert other.max() > 1000 * TOLERANCE


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_the_scores_of_the_first_and_the_last_token_are_the_originals(index):
    reference = Reference("openvla")
    stages, found = reference.runner.stages, []
    for name, inputs in reference.runner.stage_inputs(reference.observation(index)):
        if name != "vision":
            found.append(stages[name].run(inputs)["scores"][0])
    assert len(found) == 3
    expected = reference[index, "scores"]
    for ours, theirs in zip(found, expected[[0, 1, -1]], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("index", OBSERVATIONS)
def test_ofts_state_is_scaled_and_held_as_the_original_does(index):
    reference = Reference("oft")
    tokenizer = InstructionTokenizer.of(reference.spec, reference.checkpoint.tokenizer_path)
    state = Preprocessor(reference.spec, tokenizer).state(reference.observation(index).joints)
    np.testing.assert_allclose(state[0], reference[index, "state"], atol=2e-6)
