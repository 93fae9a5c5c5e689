"""Meta-World with the controller of the robot, for closed-loop evaluation.

The hand's three coordinates and the distance between the fingers stand where a robot has joints, all in m. Their limits
are what the environment itself would do of its action: the box of the hand's target, 1 cm a step, and as much again as
the change of that from one step to the next. What watches over a robot has nothing to watch over here and is switched
off: a chunk that leaves the limits is cut by them, as Meta-World cuts its actions, and not refused.
"""

from __future__ import annotations

from vla_edge.evaluate.closed_loop import ClosedLoopError, LoopOptions
from vla_edge.evaluate.closed_loop_result import EpisodeRow
from vla_edge.evaluate.kernel_rig import EPISODE_START_NS, KernelRig
from vla_edge.robots.robot import Joint, Robot
from vla_edge.sim.metaworld import CAMERA, JOINTS, OPENING_M, PICTURE, STEP_NS, STRIDE_M, MetaWorld
from vla_edge.types import NANOSECONDS, JointCommand, JointState, Observation

STEP_S = STEP_NS / NANOSECONDS
UNGUARDED = {
    "position_margin": 0.0, "limit_repulsion": 0.0, "tracking_error": 0.0, "torque_band": 0.0,
    "position_tolerance": 1.0, "chunk_velocity_ratio": 100.0, "max_first_step": 7.0,
}  # fmt: skip


class MetaWorldRig(KernelRig):
    """`sim.metaworld.MetaWorld` behind the controller.

    Args:
        world: a fresh one when None.

    Attributes:
        world: the simulation.

    Raises:
        MetaWorldError: Meta-World is not installed.
    """

    def __init__(self, world: MetaWorld | None = None):
        self.world = world or MetaWorld()

    def begin(self, seed: int, options: LoopOptions) -> str:
        """A fresh episode and controller; returns its instruction."""
        if options.instruction_override != "none":
            raise ClosedLoopError("a scene of Meta-World has one goal, so there are no instructions to shuffle")
        episode = self.world.reset(seed, options.tier)
        self._arm(_robot(self.world), JOINTS, options.control_hz, **UNGUARDED)
        return episode.instruction

    def observe(self, instruction: str) -> Observation:
        """What the camera and the hand show now."""
        joints = self._joints()
        return Observation(joints.stamp_ns, {CAMERA: self.world.render(PICTURE, PICTURE)}, joints, instruction)

    def finished(self) -> bool:
        """Done as Meta-World judges it, or out of time."""
        return self.world.finished

    def row(self, seed: int) -> EpisodeRow:
        """How it went; with one goal to a scene nothing else can be reached first, nor this one by chance."""
        episode, success = self.world.episode, self.world.success
        return EpisodeRow(
            seed, episode.task, episode.instruction, episode.task, success, success,
            wrong_first=False, chance=1.0, seconds=self.world.time_ns / NANOSECONDS, **self.counted(),
        )  # fmt: skip

    def _joints(self) -> JointState:
        return self.world.joint_state(EPISODE_START_NS + self.world.time_ns)

    def _act(self, command: JointCommand | None, until_ns: int) -> None:
        steps = (until_ns - EPISODE_START_NS - self.world.time_ns) // STEP_NS
        for _ in range(steps):
            if not self.world.finished:
                self.world.step(command.position)


def _robot(world: MetaWorld) -> Robot:
    """Limits for the task at hand."""
    strides = (STRIDE_M, STRIDE_M, STRIDE_M, OPENING_M)
    joints = [
        Joint(name, low, high, velocity=stride / STEP_S, acceleration=stride / STEP_S**2, home=(low + high) / 2)
        for name, low, high, stride in zip(JOINTS, *world.bounds(), strides)
    ]
    return Robot("metaworld", tuple(joints))
