"""Whatever holds recorded observations: a bag, a LeRobot dataset, demonstrations.

A recording first tells its moments, which is cheap, and decodes pictures of those that are asked for: a sample of a
hundred observations costs as much of a day's recording as of a minute's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vla_edge.policy.spec import PolicySpec
from vla_edge.types import Observation

# lies between episodes that carry no clock time, and is longer than any pause within one
BETWEEN_EPISODES_S = 10.0


@dataclass(frozen=True)
class Moment:
    """An observation that was recorded and is not decoded yet.

    Attributes:
        stamp_ns: as the observation's. Within an episode it grows by less than two seconds at a time, between episodes
            by more.
        read: decodes it.
    """

    stamp_ns: int
    instruction: str
    read: Callable[[], Observation]


class Recording(AbstractContextManager, Protocol):
    """Something recorded, opened; closes its files when left as a context manager."""

    def moments(self, spec: PolicySpec) -> Iterator[Moment]:
        """What was recorded, in order, each as the policy of `spec` is to be shown it: its cameras, its joints.

        Raises:
            VlaEdgeError: a camera or joint of the policy was not recorded, or a file is damaged; from `read` too.
        """


def open_recording(path: str | Path) -> Recording:
    """What lies at `path`.

    Raises:
        BagError, DatasetError, DemonstrationError: nothing that can be read.
    """
    path = Path(path)
    if (path / "meta" / "info.json").is_file():
        from vla_edge.evaluate.lerobot_dataset import LeRobotDataset

        return LeRobotDataset(path)
    if path.is_dir() and ((path / "recording.json").is_file() or any(path.glob("shard-*.npz"))):
        from vla_edge.evaluate.demonstrations import DemonstrationRecording

        return DemonstrationRecording(path)
    from vla_edge.evaluate.bag import Bag

    return Bag(path)
