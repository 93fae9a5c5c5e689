"""The simulated G1 at its table with the controller of the robot, for closed-loop evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlKernel
from vla_edge.control.screening import RejectedChunk
from vla_edge.evaluate.closed_loop import LoopOptions
from vla_edge.evaluate.closed_loop_result import EpisodeRow
from vla_edge.robots.g1 import g1
from vla_edge.sim.world import STEP_NS, TabletopWorld
from vla_edge.types import NANOSECONDS, ActionChunk, JointState, Observation

# Every episode has the same clock, or its noise would depend on the episodes before it.
EPISODE_START_NS = NANOSECONDS
CAMERA_HEIGHT, CAMERA_WIDTH = 480, 640


class TabletopRig:
    """`sim.world.TabletopWorld` and `control.kernel.ControlKernel`, ticked together on episode time.

    The controller is armed with its start ramp behind it, as on a robot that has been up for a while.

    Attributes:
        world: the simulation.
        kernel: the controller of the running episode.
    """

    def __init__(self):
        self.world = TabletopWorld()
        self._robot = g1()
        self.kernel: ControlKernel | None = None
        self._offset_ns = self._now_ns = 0

    def begin(self, seed: int, options: LoopOptions) -> str:
        """A fresh scene and controller; returns the instruction that is given."""
        self._episode = episode = self.world.reset(seed, options.tier)
        self._given, instruction = episode.goal, episode.instruction
        if options.instruction_override == "shuffled":
            rng = np.random.default_rng([seed, 1])
            others = [goal for goal in episode.goals if goal != episode.goal]
            self._given = others[rng.integers(len(others))]
            instruction = self._given.wordings[rng.integers(len(self._given.wordings))]
            self.world.ask(self._given, instruction)
        self._instruction = instruction
        self._offset_ns = EPISODE_START_NS - self.world.time_ns
        self._now_ns = EPISODE_START_NS
        rate = round(options.control_hz)
        config = ControlConfig(tick_rate=rate, command_rate=rate, start_ramp=0.0)
        self.kernel = ControlKernel(self._robot, self.world.joint_names, config)
        self.kernel.rearm(self._joints(), self.now_ns)
        return instruction

    @property
    def now_ns(self) -> int:
        """Episode time of the controller; the world follows in whole physics steps."""
        return self._now_ns

    def observe(self, instruction: str) -> Observation:
        """What the head camera and the joints show now."""
        pixels = self.world.render(CAMERA_HEIGHT, CAMERA_WIDTH, "head")
        joints = self._joints()
        return Observation(joints.stamp_ns, {"head": pixels}, joints, instruction)

    def tick(self, seconds: float) -> None:
        """One command, and the world up to the next."""
        self.kernel.update_joints(self._joints(), self.now_ns)
        command = self.kernel.tick(self.now_ns)
        if command is not None:
            self.world.apply(command)
        self._now_ns += round(seconds * NANOSECONDS)
        steps = (self._now_ns - self._offset_ns - self.world.time_ns) // STEP_NS
        if steps:
            self.world.step(steps * STEP_NS / NANOSECONDS)

    def accept(self, chunk: ActionChunk) -> bool:
        """Hands a chunk to the controller; False when it is rejected."""
        try:
            self.kernel.accept_chunk(chunk, self.now_ns)
        except RejectedChunk:
            return False
        return True

    def commanded(self) -> np.ndarray:
        """(J,) rad, a copy."""
        return self.kernel.position.copy()

    def finished(self) -> bool:
        """Whether both the goal that was given and the scene's own are decided."""
        return self.world.finished(self._given) and (
            self._given == self._episode.goal or self.world.finished(self._episode.goal)
        )

    def row(self, seed: int) -> EpisodeRow:
        """How it went, from the state of the physics."""
        given, true = self.world.outcome(self._given), self.world.outcome(self._episode.goal)
        counters = self.kernel.counters
        return EpisodeRow(
            seed=seed,
            goal=self._episode.goal.name,
            instruction=self._instruction,
            given_goal=self._given.name,
            success=true.success,
            given_success=given.success,
            wrong_first=given.wrong_first,
            chance=self._episode.chance,
            seconds=given.time_s,
            limit_hits=counters.limit_hits,
            holds=counters.holds,
            rejections={reason: count for reason, count in counters.rejected.items() if count},
        )

    def _joints(self) -> JointState:
        state = self.world.joint_state()
        return replace(state, stamp_ns=state.stamp_ns + self._offset_ns)
