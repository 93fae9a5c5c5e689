"""Observations as the network sees them, from a recording or from demonstrations, for training against a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla_edge.learn.losses import euler_path
from vla_edge.policy.preprocess import Preprocessor, as_delivered
from vla_edge.policy.smolvla import PrefixCache
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import JointState, Observation

# 24,000 pictures of 96 x 96 pixels
MOST_BYTES = 24_000 * 3 * 96**2


@dataclass(frozen=True)
class Frames:
    """N observations.

    Attributes:
        images: (N, pictures, 3, H, W) uint8, or float32 where the network sees other numbers than [-1, 1]; a picture of
            each camera for each observation that is read.
        tokens: (N, L) int64. mask: (N, L) bool.
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
        return policy.prefix.encode(self.seen_by(policy, gain), self.tokens, self.mask, self.state)

    def chunk_of(self, policy, noise: Tensor, num_steps: int) -> Tensor:
        """The normalized chunk (1, T, A) of a single frame, differentiable; from `noise` where the policy has a flow."""
        if hasattr(policy, "chunk"):
            return policy.chunk(self.seen_by(policy), self.tokens, self.mask, self.state)
        *_, chunk = euler_path(policy, noise, self.shown_to(policy)[0], num_steps)
        return chunk

    def seen_by(self, policy, gain: Tensor | None = None) -> Tensor:
        """Tokens of all cameras, (N, cameras * tokens, width); `gain` as in `pixels`."""
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
    columns: dict[str, list] = {"images": [], "lang_tokens": [], "lang_mask": [], "state": []}
    for observation in observations:
        tensors = preprocess(observation)
        pictures = np.stack([tensors[f"image.{camera.name}"] for camera in spec.cameras], axis=1)
        columns["images"].append(_kept(pictures.reshape(-1, *pictures.shape[2:]), spec))
        for name in ("lang_tokens", "lang_mask"):
            columns[name].append(tensors[name][0])
        columns["state"].append(tensors["state"].reshape(-1))
    images, tokens, mask, state = (torch.from_numpy(np.stack(column)) for column in columns.values())
    return Frames(images, tokens, mask, state)


def from_demonstrations(
    directories: Sequence[str | Path], spec: PolicySpec, tokenizer: str | Path, instructions: Sequence[str] = ()
) -> Frames:
    """Frames of demonstrations (see `sim.demonstrations`) with the actions that were shown, of longer chunks the first;
    no more than `MOST_BYTES` of pictures, spread evenly.

    Args:
        instructions: patterns of those to take; all when there are none.

    Raises:
        DemonstrationError: there are none, they are damaged, or not of the policy's camera, joints and chunks.
        ObservationError: their pictures are not the camera's.
    """
    from vla_edge.learn.dataset import Demonstrations, instructed
    from vla_edge.sim.demonstrations import DemonstrationError, read_mark, shards

    words = InstructionTokenizer.of(spec, tokenizer)
    if spec.text.state_dims:
        raise DemonstrationError("a policy that reads its state as words cannot be trained on demonstrations yet")
    if len(spec.cameras) != 1:
        raise DemonstrationError(f"demonstrations are of one camera, and the policy takes {len(spec.cameras)}")
    recorded = {str(directory): read_mark(directory) for directory in directories}
    names = next(iter(recorded.values()))["joint_names"]
    for directory, said in recorded.items():
        joints, dt = said["joint_names"], said["dt"]
        lacking = [name for name in (*spec.joint_names, *spec.read_names) if name not in joints]
        if lacking or joints != names:
            verb = "moves" if not lacking or lacking[0] in spec.joint_names else "reads"
            raise DemonstrationError(
                f"demonstrations in {directory} are of the joints {', '.join(joints)}; the policy {verb} "
                f"{lacking[0] if lacking else 'those of the others'}: record them with the robot it is for"
            )
        if abs(dt - spec.dt) > 1e-6:
            raise DemonstrationError(
                f"demonstrations in {directory} show points every {dt:g} s and the policy gives them every "
                f"{spec.dt:g} s; record them at its rate"
            )
    moved, read = ([names.index(name) for name in wanted] for wanted in (spec.joint_names, spec.read_names))
    total = sum(
        int(instructed(shard["instruction"], instructions).sum())
        for directory in directories
        for shard in shards(directory, ("instruction",))
    )
    most = max(1, MOST_BYTES // (3 * spec.cameras[0].height * spec.cameras[0].width))
    batch = Demonstrations(directories, words, every=max(1, -(-total // most)), instructions=instructions).everything()
    if batch.action.shape[1] < spec.chunk_size:
        raise DemonstrationError(
            f"demonstrations in {directories[0]} show {batch.action.shape[1]} points at a time and the policy gives "
            f"{spec.chunk_size}; record them with chunks of that size"
        )
    positions, motion = batch.state[:, moved], batch.action[:, : spec.chunk_size, moved]
    state = np.zeros((len(positions), spec.max_state_dim), np.float32)
    state[:, : len(read)] = spec.state.normalize(batch.state[:, read])
    actions = np.zeros((*motion.shape[:2], spec.max_action_dim), np.float32)
    shown = np.where(spec.offset_joints, motion, motion + positions[:, None])
    actions[..., : len(moved)] = spec.action.normalize(shown)
    return Frames(
        _pictures(batch.images, spec, words), torch.from_numpy(batch.tokens), torch.from_numpy(batch.mask),
        torch.from_numpy(state), torch.from_numpy(actions),
    )  # fmt: skip


def _pictures(stored: np.ndarray, spec: PolicySpec, words: InstructionTokenizer) -> Tensor:
    """(N, H, W, 3) uint8 as they were recorded -> (N, 1, 3, height, width) for the network of one camera."""
    (camera,) = spec.cameras
    if stored.shape[1:3] == (camera.height, camera.width):
        return torch.from_numpy(stored).permute(0, 3, 1, 2)[:, None]
    preprocess, nobody = Preprocessor(spec, words), JointState(0, (), np.zeros(0))
    frames = (Observation(0, {camera.name: as_delivered(one, camera)}, nobody, "") for one in stored)
    return torch.from_numpy(np.stack([_kept(preprocess.image(frame, camera), spec) for frame in frames]))


def _kept(pictures: np.ndarray, spec: PolicySpec) -> np.ndarray:
    """(pictures, 3, H, W), in a quarter of the memory where neither padding nor scale leaves [-1, 1]."""
    if any(camera.padding < -1 or camera.is_scaled for camera in spec.cameras):
        return pictures
    return np.rint((pictures + 1) * 127.5).astype(np.uint8)
