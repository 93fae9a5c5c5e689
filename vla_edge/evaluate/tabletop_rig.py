"""The simulated G1 at its table with the controller of the robot, for closed-loop evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vla_edge.evaluate.closed_loop import LoopOptions
from vla_edge.evaluate.closed_loop_result import EpisodeRow
from vla_edge.evaluate.kernel_rig import EPISODE_START_NS, KernelRig
from vla_edge.robots.g1 import g1
from vla_edge.sim.world import STEP_NS, TabletopWorld
from vla_edge.types import NANOSECONDS, JointCommand, JointState, Observation

CAMERA_HEIGHT, CAMERA_WIDTH = 480, 640


class TabletopRig(KernelRig):
    """`sim.world.TabletopWorld` behind the controller.

    Attributes:
        world: the simulation.
    """

    def __init__(self):
        self.world = TabletopWorld()
        self._robot = g1()
        self._offset_ns = 0

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
        self._arm(self._robot, self.world.joint_names, options.control_hz)
        return instruction

    def observe(self, instruction: str) -> Observation:
        """What the head camera and the joints show now."""
        pixels = self.world.render(CAMERA_HEIGHT, CAMERA_WIDTH, "head")
        joints = self._joints()
        return Observation(joints.stamp_ns, {"head": pixels}, joints, instruction)

    def finished(self) -> bool:
        """Whether both the goal that was given and the scene's own are decided."""
        return self.world.finished(self._given) and (
            self._given == self._episode.goal or self.world.finished(self._episode.goal)
        )

    def row(self, seed: int) -> EpisodeRow:
        """How it went, from the state of the physics."""
        given, true = self.world.outcome(self._given), self.world.outcome(self._episode.goal)
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
            **self.counted(),
        )

    def _joints(self) -> JointState:
        state = self.world.joint_state()
        return replace(state, stamp_ns=state.stamp_ns + self._offset_ns)

    def _act(self, command: JointCommand | None, until_ns: int) -> None:
        if command is not None:
            self.world.apply(command)
        steps = (until_ns - self._offset_ns - self.world.time_ns) // STEP_NS
        if steps:
            self.world.step(steps * STEP_NS / NANOSECONDS)
