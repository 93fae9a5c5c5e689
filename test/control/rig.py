"""A kernel on a virtual clock with a robot that does as it is told, and a judge of every command."""

from __future__ import annotations

import numpy as np

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlKernel
from vla_edge.robots.g1 import DRIVEN_JOINTS, g1
from vla_edge.types import ActionChunk, JointState

MS = 1_000_000
START = 1_700_000_000 * 1_000_000_000


class Rig:
    """Ticks a kernel, feeds it ideal joint states and records the commands.

    Args:
        start: (J,) rad where the robot stands.
        joints_every: ticks between joint states, 0 for none.
        armed: re-arm at the start.
        settle: s of standing before START, so that a chunk may answer an observation from before it.
    """

    def __init__(
        self, config=None, start=None, joints_every=2, armed=True, names=DRIVEN_JOINTS, settle=1.0,
        capsules=None,
    ):
        self.config = config or ControlConfig(start_ramp=0.0)
        self.kernel = ControlKernel(g1(), names, self.config, capsules)
        self.names = self.kernel.joint_names
        self.now = START - round(settle * 1e9) if armed else START
        self.measured = np.zeros(len(names)) if start is None else np.array(start, float)
        self.joints_every = joints_every
        self.commands, self.velocities, self.modes, self.times = [], [], [], []
        if armed:
            self.rearm()
            self.run(settle)
            self.forget()

    def state(self, stamp=None) -> JointState:
        return JointState(self.now if stamp is None else stamp, self.names, self.measured)

    def rearm(self) -> None:
        self.kernel.rearm(self.state(), self.now)
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded, keeping the running command as the first row."""
        self.commands, self.velocities = [self.kernel.position.copy()], [self.kernel.velocity.copy()]
        self.modes, self.times = [self.kernel.mode], [self.now]

    def chunk(self, positions, age=0.1, dt=0.05, names=None) -> ActionChunk:
        return ActionChunk(self.now - round(age * 1e9), names or self.names, positions, dt)

    def send(self, positions, **how) -> None:
        self.kernel.accept_chunk(self.chunk(positions, **how), self.now)

    def limits(self) -> tuple[np.ndarray, ...]:
        """(lower, upper, velocity, acceleration, jerk)."""
        limits = self.kernel.limits
        return limits.lower, limits.upper, limits.velocity, limits.acceleration, limits.jerk

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * self.config.tick_rate)):
            self.tick()

    def tick(self, late_ns: int = 0) -> None:
        self.now += self.config.period_ns + late_ns
        if self.joints_every and len(self.commands) % self.joints_every == 0:
            self.kernel.update_joints(self.state(), self.now)
        command = self.kernel.tick(self.now)
        if command is not None:
            self.measured = command.position
            self.commands.append(command.position)
            self.velocities.append(command.velocity)
        self.modes.append(self.kernel.mode)
        self.times.append(self.now)

    @property
    def path(self) -> np.ndarray:
        """(N, J) rad, one row per tick."""
        return np.array(self.commands)

    def derivatives(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finite differences of the recorded path, up to jerk; begins at rest."""
        path = np.concatenate([self.path[:1]] * 3 + [self.path])
        rate = self.config.tick_rate
        velocity = np.diff(path, axis=0) * rate
        acceleration = np.diff(velocity, axis=0) * rate
        return velocity, acceleration, np.diff(acceleration, axis=0) * rate

    def judge(self) -> None:
        """Assert that no command recorded since the last `forget` (at rest) left a limit, without any tolerance."""
        lower, upper, top, most, hardest = self.limits()
        velocity, acceleration, jerk = self.derivatives()
        assert np.isfinite(self.path).all()
        assert (self.path >= lower).all() and (self.path <= upper).all()
        assert (np.abs(velocity) <= top).all(), np.abs(velocity).max()
        assert (np.abs(acceleration) <= most).all(), np.abs(acceleration).max()
        assert (np.abs(jerk) <= hardest).all(), np.abs(jerk).max()


def sine(rig: Rig, seconds, amplitude=0.3, hertz=0.4) -> np.ndarray:
    """(T, J) a slow wave, different for each joint, over absolute `seconds` since START; at rest at 0 rad at START."""
    seconds = np.asarray(seconds)[:, None]
    phase = np.linspace(0.5, 1.0, len(rig.names)) * hertz
    return amplitude * (1 - np.cos(2 * np.pi * phase * seconds)) / 2
