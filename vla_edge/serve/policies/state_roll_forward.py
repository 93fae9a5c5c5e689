"""State roll-forward (VLASH; Tang et al., 2025, arXiv:2512.01031): the policy is told the joints as they will be when its
chunk arrives, and its chunk begins there. Made for policies trained with such offsets; others see a picture that is
older than their joints."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vla_edge.serve.inference_policy import Request, Situation
from vla_edge.serve.plan import positions_at, row_stamps
from vla_edge.types import NANOSECONDS, ActionChunk, JointState


@dataclass(frozen=True)
class StateRollForward:
    """Whole rows of the running chunk, as many as the delay takes, come before the new one's."""

    def due(self, running: ActionChunk | None, now_ns: int) -> bool:
        return True

    def prepare(self, situation: Situation) -> Request:
        observation, running = situation.observation, situation.running
        if running is None:
            return Request(observation)
        joints = observation.joints
        later_ns = round(self._rows(situation, running) * running.dt * NANOSECONDS)
        stamps = np.array([observation.stamp_ns, observation.stamp_ns + later_ns])
        now, later = positions_at(running, stamps)
        # The joints lag behind their targets; they are taken to do so by as much later on.
        moved = dict(zip(running.joint_names, later - now))
        position = joints.position + [moved.get(name, 0.0) for name in joints.names]
        rolled = JointState(joints.stamp_ns, joints.names, position, joints.velocity, joints.effort)
        return Request(replace(observation, joints=rolled))

    def place(self, chunk: ActionChunk, situation: Situation, now_ns: int) -> ActionChunk:
        if situation.running is None:
            return chunk
        rows = self._rows(situation, chunk)
        passed = positions_at(situation.running, row_stamps(chunk)[:rows], chunk.joint_names)
        return replace(chunk, positions=np.concatenate([passed, chunk.positions[: len(chunk.positions) - rows]]))

    def _rows(self, situation: Situation, chunk: ActionChunk) -> int:
        return min(situation.late_rows(chunk.dt), len(chunk.positions) - 1)
