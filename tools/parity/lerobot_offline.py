"""LeRobot's own SmolVLA, offline, as the independent reference.

Runs in an environment of its own (doc/parity.md), because lerobot pins other versions than the package does. Nothing
of LeRobot or transformers is replaced.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torchvision's wheels are built for CUDA; beside a CPU torch the operators this part describes do not exist
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from lerobot.policies.factory import make_pre_post_processors  # noqa: E402
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy  # noqa: E402
from lerobot.policies.utils import prepare_observation_for_inference  # noqa: E402


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    """The working directory LeRobot needs, since `vlm_model_name` is relative to the checkpoint."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Prediction:
    """What LeRobot makes of one observation.

    Attributes:
        images: (1, 3, H, W) per camera, as the vision tower gets them. tokens, mask: (1, L'), L' as LeRobot pads.
        state: (1, max_state_dim). prefix: (1, P', text_width) embeddings.
        velocity: (1, T, A) of the first flow step. raw: (1, T, action) normalized. actions: (1, T, action) SI.
    """

    images: list[np.ndarray]
    tokens: np.ndarray
    mask: np.ndarray
    state: np.ndarray
    prefix: np.ndarray
    velocity: np.ndarray
    raw: np.ndarray
    actions: np.ndarray


class LeRobotSmolVLA:
    """A `pretrained_model/` directory with its backbone inside, loaded strictly and run by LeRobot alone."""

    def __init__(self, directory: str | Path):
        directory = Path(directory).resolve()
        with inside(directory):
            self.policy = SmolVLAPolicy.from_pretrained(".", strict=True)
            self._before, self._after = make_pre_post_processors(self.policy.config, pretrained_path=".")
        self.config = self.policy.config

    def batch(self, images: Mapping[str, np.ndarray], state: np.ndarray, task: str) -> dict:
        """Through LeRobot's own inference preparation and pre-processor.

        Args:
            images: feature name -> (H, W, 3) uint8, cropped. state: (D,) SI.
        """
        observation = {key: image.copy() for key, image in images.items()}
        observation["observation.state"] = np.asarray(state, np.float32)
        return self._before(prepare_observation_for_inference(observation, torch.device("cpu"), task))

    @torch.no_grad()
    def predict(
        self, images: Mapping[str, np.ndarray], state: np.ndarray, task: str, noise: np.ndarray
    ) -> Prediction:
        """Everything on the way from an observation to an action chunk, noise (1, T, A) given."""
        batch, noise = self.batch(images, state, task), torch.from_numpy(noise)
        pictures, present = self.policy.prepare_images(batch)
        padded = self.policy.prepare_state(batch)
        tokens = batch["observation.language.tokens"]
        mask = batch["observation.language.attention_mask"]
        model = self.policy.model
        prefix, _, _ = model.embed_prefix(pictures, present, tokens, mask, state=padded)

        velocities = []
        denoise = model.denoise_step
        model.denoise_step = lambda **inputs: velocities.append(denoise(**inputs)) or velocities[-1]
        try:
            raw = self.policy.predict_action_chunk(batch, noise=noise.clone())
        finally:
            del model.denoise_step
        actions = self._after(raw.clone())
        return Prediction(
            [picture.numpy() for picture in pictures],
            *(tensor.numpy() for tensor in (tokens, mask, padded, prefix, velocities[0], raw, actions)),
        )
