"""Recorded demonstrations (`sim.demonstrations`) as the policy would have seen them.

They hold pictures of the size the network takes. A frame of the camera is made of each that gives the network exactly
that picture again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from vla_edge.evaluate.recording import BETWEEN_EPISODES_S, Moment
from vla_edge.policy.preprocess import as_delivered
from vla_edge.policy.spec import PolicySpec
from vla_edge.sim.demonstrations import DemonstrationError, read_mark, read_shard, shard_files
from vla_edge.types import NANOSECONDS, JointState, Observation


class DemonstrationRecording:
    """One directory of demonstrations.

    Raises:
        DemonstrationError: there are none, or it is not told what they hold.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files = shard_files(self.path)
        said = read_mark(self.path)
        self._names, self._dt = said["joint_names"], said["dt"]
        self._pictures: tuple[Path | None, np.ndarray | None] = None, None

    def moments(self, spec: PolicySpec) -> Iterator[Moment]:
        """See `Recording.moments`."""
        wanted = spec.measured_names
        lacking = [name for name in wanted if name not in self._names]
        if lacking or len(spec.cameras) != 1:
            raise DemonstrationError(
                f"demonstrations in {self.path} are of one camera and the joints {', '.join(self._names)}; the policy "
                f"takes {len(spec.cameras)} cameras{f' and {lacking[0]}' if lacking else ''}"
            )
        if spec.lags:
            raise DemonstrationError(
                f"the policy reads {spec.observation_steps} observations at a time and demonstrations in {self.path} are "
                "single ones; give a bag or a LeRobot dataset"
            )
        columns = [self._names.index(name) for name in wanted]
        start_ns, last, before = 0, 0, None
        for file in self._files:
            shard = read_shard(file, ("state", "instruction", "episode", "step"))
            for row, (episode, step) in enumerate(zip(shard["episode"], shard["step"])):
                if episode != before:
                    start_ns, before = last + round(BETWEEN_EPISODES_S * NANOSECONDS), episode
                last = start_ns + round(int(step) * self._dt * NANOSECONDS)
                joints = JointState(last, wanted, shard["state"][row][columns])
                instruction = str(shard["instruction"][row])
                yield Moment(last, instruction, partial(self._observation, file, row, joints, instruction, spec))

    def close(self) -> None:
        """Lets go of the pictures held."""
        self._pictures = None, None

    def __enter__(self) -> DemonstrationRecording:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _observation(self, file: Path, row: int, joints: JointState, instruction: str, spec: PolicySpec) -> Observation:
        if self._pictures[0] != file:
            self._pictures = file, read_shard(file, ("images",))["images"]
        camera = spec.cameras[0]
        picture = as_delivered(self._pictures[1][row], camera)
        return Observation(joints.stamp_ns, {camera.name: picture}, joints, instruction)
