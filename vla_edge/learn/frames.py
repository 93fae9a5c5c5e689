"""Observations as the network sees them, from a recording or from demonstrations, for training against a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla_edge.learn.losses import euler_path
from vla_edge.policy.preprocess import Preprocessor
from vla_edge.policy.smolvla import PrefixCache
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import Observation

# of 96 x 96 pixels they take 0.7 GB
MOST_FRAMES = 24_000


@dataclass(frozen=True)
class Frames:
    """N observations.

    Attributes:
        images: (N, pictures, 3, H, W) uint8, or float32 where the network sees other numbers than [-1, 1]; a picture of
            each camera for each observation that is read. tokens: (N, L) int64. mask: (N, L) bool.
        state: (N, S) float32, normalized and padded; of all observations that are read.
        actions: (N, T, A) float32, normalized and padded; None where nobody showed any.
    """

    images: Tensor
    tokens: Tensor
    mask: Tensor
    state: Tensor
    actions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.state)

    def take(self, index) -> Frames:
        """Those frames."""
        index = torch.as_tensor(np.asarray(index))
        actions = None if self.actions is None else self.actions[index]
        return Frames(self.images[index], self.tokens[index], self.mask[index], self.state[index], actions)

    def of_joints(self, columns: Sequence[int]) -> Frames:
        """As a policy of those joints alone sees them."""
        columns = list(columns)
        actions = None if self.actions is None else self.actions[..., columns]
        return replace(self, state=self.state[:, columns], actions=actions)

    def shown_to(self, policy, gain: Tensor | None = None) -> tuple[PrefixCache, list[Tensor]]:
        """What the policy's action expert gets of them, and where its text layers look; `gain` as in `pixels`."""
        return policy.prefix.encode(self._seen_by(policy, gain), self.tokens, self.mask, self.state)

    def chunk_of(self, policy, noise: Tensor, num_steps: int) -> Tensor:
        """The normalized chunk (1, T, A) of a single frame, differentiable; from `noise` where the policy has a flow."""
        if hasattr(policy, "chunk"):
            return policy.chunk(self._seen_by(policy), self.tokens, self.mask, self.state)
        *_, chunk = euler_path(policy, noise, self.shown_to(policy)[0], num_steps)
        return chunk

    def _seen_by(self, policy, gain: Tensor | None = None) -> Tensor:
        """Tokens of all cameras, (N, cameras * tokens, width)."""
        pixels = self.pixels(gain)
        tokens = policy.vision(pixels.flatten(0, 1))[0]
        return tokens.unflatten(0, pixels.shape[:2]).flatten(1, 2)

    def pixels(self, gain: Tensor | None = None) -> Tensor:
        """(N, cameras, 3, H, W) in [-1, 1]; `gain` (N,) makes them brighter or darker."""
        if self.images.dtype != torch.uint8:
            return self.images if gain is None else (self.images + 1) * gain[:, None, None, None, None] - 1
        scaled = self.images.float() * (2 / 255)
        return (scaled if gain is None else scaled * gain[:, None, None, None, None]) - 1


def from_observations(observations: Iterable[Observation], spec: PolicySpec, tokenizer: str | Path) -> Frames:
    """Frames of a recording, without actions.

    Raises:
        ObservationError, InstructionError: one cannot be shown to the policy.
    """
    preprocess = Preprocessor(spec, InstructionTokenizer.of(spec, tokenizer))
    outside = any(camera.padding < -1 or camera.is_scaled for camera in spec.cameras)
    columns: dict[str, list] = {"images": [], "lang_tokens": [], "lang_mask": [], "state": []}
    for observation in observations:
        tensors = preprocess(observation)
        pictures = np.stack([tensors[f"image.{camera.name}"] for camera in spec.cameras], axis=1)
        pictures = pictures.reshape(-1, *pictures.shape[2:])
        columns["images"].append(pictures if outside else np.rint((pictures + 1) * 127.5).astype(np.uint8))
        for name in ("lang_tokens", "lang_mask"):
            columns[name].append(tensors[name][0])
        columns["state"].append(tensors["state"].reshape(-1))
    images, tokens, mask, state = (torch.from_numpy(np.stack(column)) for column in columns.values())
    return Frames(images, tokens, mask, state)


def from_demonstrations(
    directories: Sequence[str | Path], spec: PolicySpec, tokenizer: str | Path, instructions: Sequence[str] = ()
) -> Frames:
    """Frames of demonstrations (see `sim.demonstrations`) with the actions that were shown; at most `MOST_FRAMES`.

    Args:
        instructions: patterns of those to take; all when there are none.

    Raises:
        DemonstrationError: there are none, they are damaged, or not of the policy's joints and chunks.
    """
    from vla_edge.learn.dataset import Demonstrations, instructed
    from vla_edge.sim.demonstrations import DemonstrationError, joint_names, shards

    words = InstructionTokenizer.of(spec, tokenizer)
    if spec.text.state_dims:
        raise DemonstrationError("a policy that reads its state as words cannot be trained on demonstrations yet")
    recorded = {str(directory): joint_names(directory) for directory in directories}
    names = next(iter(recorded.values()))
    for directory, joints in recorded.items():
        lacking = [name for name in spec.joint_names if name not in joints]
        if lacking or joints != names:
            raise DemonstrationError(
                f"demonstrations in {directory} are of the joints {', '.join(joints)}; the policy moves "
                f"{lacking[0] if lacking else 'those of the others'}: record them with the robot it is for"
            )
    columns = [names.index(name) for name in spec.joint_names]
    total = sum(
        int(instructed(shard["instruction"], instructions).sum())
        for directory in directories
        for shard in shards(directory, ("instruction",))
    )
    batch = Demonstrations(
        directories, words, every=max(1, -(-total // MOST_FRAMES)), instructions=instructions
    ).everything()
    if batch.action.shape[1] != spec.chunk_size:
        raise DemonstrationError(
            f"demonstrations in {directories[0]} show {batch.action.shape[1]} points at a time and the policy gives "
            f"{spec.chunk_size}; record them with chunks of that size"
        )
    positions, motion = batch.state[:, columns], batch.action[..., columns]
    state = np.zeros((len(positions), spec.max_state_dim), np.float32)
    state[:, : len(columns)] = spec.state.normalize(positions)
    actions = np.zeros((*motion.shape[:2], spec.max_action_dim), np.float32)
    shown = motion if spec.relative_actions else motion + positions[:, None]
    actions[..., : len(columns)] = spec.action.normalize(shown)
    images = torch.from_numpy(batch.images).permute(0, 3, 1, 2)[:, None]
    return Frames(
        images, torch.from_numpy(batch.tokens), torch.from_numpy(batch.mask), torch.from_numpy(state),
        torch.from_numpy(actions),
    )  # fmt: skip


def with_actions_of(policy, frames: Frames, num_steps: int, batch: int = 64, seed: int = 0) -> Frames:
    """The frames with what `policy` would do (behaviour of the teacher), one sample each."""
    generator, chunks = torch.Generator().manual_seed(seed), []
    shape = (policy.config.chunk_size, policy.config.max_action_dim)
    with torch.no_grad():
        for begin in range(0, len(frames), batch):
            part = frames.take(np.arange(begin, min(begin + batch, len(frames))))
            noise, cache = torch.randn(len(part), *shape, generator=generator), part.shown_to(policy)[0]
            *_, actions = euler_path(policy, noise, cache, num_steps)
            chunks.append(actions)
    return replace(frames, actions=torch.cat(chunks))
