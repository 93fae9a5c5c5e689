"""Demonstrations in memory, and the batches that training takes from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from vla_edge.policy.spec import Normalization, NormalizationMode
from vla_edge.sim.demonstrations import DemonstrationError, shards


@dataclass(frozen=True)
class Batch:
    """B frames as the policy sees them.

    Attributes:
        images: (B, H, W, 3) uint8. state: (B, J) rad measured. action: (B, T, J) rad, relative to `state`.
        tokens: (B, L) int64. mask: (B, L) bool.
        pointer: (B, 2) x, y of the named object in [0, 1] of the image; outside where the camera does not see it.
    """

    images: np.ndarray
    state: np.ndarray
    action: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    pointer: np.ndarray


class Demonstrations:
    """All frames of some recordings (see `sim.demonstrations.record`), about 30 kB a frame.

    Args:
        directories: recordings, of the same image size and chunk.
        tokenize: instruction -> ((1, L) ids, (1, L) mask), an `InstructionTokenizer`.
        every: only each n-th frame of a shard is kept.
        shares: of a batch, one for each directory; in proportion to their frames when left out.
        instructions: only frames of an instruction that one of these patterns matches; all of them when left out.

    Raises:
        DemonstrationError: there are none, they are damaged, or none of those instructions is among them.
    """

    def __init__(
        self,
        directories: Sequence[str | Path],
        tokenize,
        every: int = 1,
        shares: Sequence[float] = (),
        instructions: Sequence[str] = (),
    ):
        if shares and (len(shares) != len(directories) or min(shares) <= 0):
            raise DemonstrationError(f"{len(directories)} directories need as many shares above 0, not {tuple(shares)}")
        gathered: dict[str, list[np.ndarray]] = {
            "images": [],
            "state": [],
            "action": [],
            "instruction": [],
            "pointer": [],
        }
        ends = []
        for directory in directories:
            for shard in shards(directory):
                wanted = np.flatnonzero(instructed(shard["instruction"], instructions))[::every]
                for name, arrays in gathered.items():
                    arrays.append(shard[name][wanted])
            ends.append(sum(map(len, gathered["state"])))
        if not ends[-1]:
            raise DemonstrationError(
                f"no demonstration in {', '.join(map(str, directories))} has an instruction like "
                f"{' or '.join(map(repr, instructions))}; patterns are of whole instructions, as in '*red cube*'"
            )
        self._ranges = list(zip([0, *ends], ends))
        self._shares = np.array(shares) / sum(shares) if shares else np.diff([0, *ends]) / ends[-1]
        # each list is let go as soon as it is joined: images alone are gigabytes
        self._images = np.concatenate(gathered.pop("images"))
        self._state = np.concatenate(gathered.pop("state"))
        self._action = np.concatenate(gathered.pop("action")) - self._state[:, None]
        self._pointer = np.concatenate(gathered.pop("pointer")) / self._images.shape[1]
        wordings, self._wording = np.unique(np.concatenate(gathered.pop("instruction")), return_inverse=True)
        pairs = [tokenize(str(wording)) for wording in wordings]
        self._tokens, self._mask = (np.concatenate(column) for column in zip(*pairs))

    def __len__(self) -> int:
        return len(self._state)

    @property
    def chunk_size(self) -> int:
        """T."""
        return self._action.shape[1]

    @property
    def image_size(self) -> int:
        """px."""
        return self._images.shape[1]

    def normalization(self) -> tuple[Normalization, Normalization]:
        """Of state and of relative action: mean and standard deviation per joint, over all points of all chunks."""
        return _mean_std(self._state), _mean_std(self._action.reshape(-1, self._action.shape[-1]))

    def everything(self) -> Batch:
        """All frames, in the order they were recorded."""
        return self._take(np.arange(len(self)))

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """`size` frames with replacement: of each directory its share, uniformly from its frames."""
        counts = np.diff([0, *np.rint(size * np.cumsum(self._shares)).astype(int)])
        return self._take(np.concatenate([rng.integers(*span, size=n) for span, n in zip(self._ranges, counts)]))

    def _take(self, index: np.ndarray) -> Batch:
        wording = self._wording[index]
        return Batch(
            self._images[index],
            self._state[index],
            self._action[index],
            self._tokens[wording],
            self._mask[wording],
            self._pointer[index],
        )


def instructed(wordings: np.ndarray, patterns: Sequence[str]) -> np.ndarray:
    """(N,) which of the (N,) instructions one of the patterns matches; all where there are no patterns."""
    known = {text: not patterns or any(fnmatchcase(text, p) for p in patterns) for text in set(map(str, wordings))}
    return np.array([known[str(text)] for text in wordings], bool)


def _mean_std(values: np.ndarray) -> Normalization:
    statistics = {"mean": values.mean(0, dtype=np.float64), "std": values.std(0, dtype=np.float64)}
    return Normalization(
        NormalizationMode.MEAN_STD, {name: tuple(map(float, numbers)) for name, numbers in statistics.items()}
    )
