"""Recordings cut at random bytes: each is evaluated up to the cut, with a warning, or refused with one clear error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.evaluate.bag import Bag, BagError
from vla_edge.evaluate.bag_writer import write_bag
from vla_edge.policy.spec import CameraSpec, Normalization, NormalizationMode, PolicySpec
from vla_edge.types import ActionChunk, InferenceTiming, JointState

KINDS = (("mcap", None), ("mcap", "chunk"), ("mcap", "message"), ("mcap", "file"), ("sqlite3", None))
JOINTS = ("a_joint", "b_joint")
START_NS = 1_700_000_000_000_000_000
_IDENTITY = Normalization(NormalizationMode.IDENTITY)
SPEC = PolicySpec(
    "smolvla", JOINTS, (CameraSpec("head", "observation.images.head", 24, 32, (0, 4, 24, 24), 24, 24),),
    8, 0.05, 1, 8, 8, 8, "{instruction}", True, _IDENTITY, _IDENTITY,
)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """What became of one. `outcome` is "used", "refused" or "wrong"; `why` says more."""

    outcome: str
    why: str = ""


@dataclass(frozen=True)
class Shown:
    """An inference of `Still`."""

    chunk: ActionChunk
    timing: InferenceTiming


class Still:
    """A policy that stays where it is: its error is known from the recording alone."""

    spec = SPEC

    def infer(self, observation, seed: int = 0, noise=None) -> Shown:
        """The measured position, held."""
        targets = np.tile(observation.joints.position, (SPEC.chunk_size, 1))
        return Shown(ActionChunk(observation.stamp_ns, JOINTS, targets, SPEC.dt), InferenceTiming(0.001, total=0.001))


def write_whole(directory: Path, storage: str, compression: str | None, seconds: float = 3.0) -> Path:
    """A recording whose every number is known."""
    items = [("instruction", START_NS, "go")]
    for k in range(round(seconds * 100)):
        stamp = START_NS + k * 10_000_000
        items.append(("joints", JointState(stamp, JOINTS, position(k / 100))))
        if k % 5 == 0:
            items.append(("image", stamp, "head", picture(k)))
    return write_bag(directory / f"{storage}-{compression}", items, storage=storage, compression=compression)


def position(seconds: float) -> np.ndarray:
    """(2,) rad."""
    return 0.3 * np.sin(np.array([2.0, 3.0]) * seconds)


def picture(k: int) -> np.ndarray:
    """(24, 32, 3) uint8, of noise: nothing that compression could rebuild."""
    return np.random.default_rng(k).integers(0, 256, (24, 32, 3), np.uint8)


def cut_at(whole: Path, size: int, directory: Path) -> Path:
    """The first `size` bytes of the recording's file, alone, as a recorder that died leaves it."""
    (file,) = (path for path in whole.iterdir() if path.name != "metadata.yaml")
    cut = directory / f"cut{file.name[file.name.index('.') :]}"
    with file.open("rb") as source:
        cut.write_bytes(source.read(size))
    return cut


def try_cut(cut: Path) -> Cut:
    """Reads and evaluates it, and holds all that comes out to what was recorded."""
    from vla_edge.evaluate.replay import evaluate_bag

    try:
        with Bag(cut) as bag:
            frames = list(bag.frames(("head",), JOINTS, horizon_s=SPEC.chunk_size * SPEC.dt))
            warnings = bag.warnings
    except BagError as error:
        return Cut("refused", str(error)) if "\n" not in str(error) else Cut("wrong", "an error of several lines")
    except Exception as error:  # noqa: BLE001 - anything else is what this looks for
        return Cut("wrong", f"{type(error).__name__}: {error}")
    if not warnings:
        return Cut("wrong", "no warning")
    for index, frame in enumerate(frames):
        k = 5 * index
        seen, stamps = frame.observation, frame.measured.stamps_ns
        told = np.array([position((stamp - START_NS) / 1e9) for stamp in stamps.tolist()]).reshape(-1, 2)
        if seen.stamp_ns != START_NS + k * 10_000_000 or not np.array_equal(seen.images["head"], picture(k)):
            return Cut("wrong", f"frame {index} shows something else")
        followed = np.array_equal(told, frame.measured.positions)
        if not (followed and np.array_equal(seen.joints.position, position(k / 100))):
            return Cut("wrong", f"frame {index} has other joints")
    try:
        found = evaluate_bag(cut, Still(), rate_hz=None)
    except BagError as error:
        return Cut("refused", str(error))
    except Exception as error:  # noqa: BLE001 - as above
        return Cut("wrong", f"{type(error).__name__}: {error}")
    if found.frames != len(frames) or not found.warnings or found.action.mean != found.hold.mean:
        return Cut("wrong", "figures that do not follow from its frames")
    return Cut("used", found.warnings[0])
