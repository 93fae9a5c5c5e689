"""The records that pass between the controller's process and the one that talks to the robot's network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vla_edge.control.capsules import CapsuleModel
from vla_edge.control.config import ControlConfig
from vla_edge.control.gravity import load_gravity
from vla_edge.control.kernel import ControlKernel
from vla_edge.control.lateness import BINS
from vla_edge.control.realtime import RealtimeRequest
from vla_edge.control.screening import MAX_POINTS, REJECTIONS
from vla_edge.robots.robot import Robot

ORDERS_KEPT = 64
"""Orders remembered; far more than arrive between two ticks."""

COUNTERS = ("ticks", "steps", "limit_hits", "holds", "faults", "late", "gaps", "accepted", "bad_joint_states",
            "reflexes", "near_collisions", "interventions", "operator_refused")


class Order(IntEnum):
    """What the operator may ask for; carried out in the order given."""

    SPEED_SCALE = 1
    HOLD = 2
    RESUME = 3
    DAMP = 4
    EMERGENCY_STOP = 5
    REARM = 6
    STOP = 7
    HAND_BACK = 8


class State(IntEnum):
    """Of the controller's process."""

    STARTING = 0
    RUNNING = 1
    ENDED = 2
    FAILED = 3


@dataclass(frozen=True)
class WorkerPlan:
    """Everything the controller's process is started with; pickled.

    Attributes:
        capsules, gravity: paths of models, empty for none.
        sink: module-level function that makes the callable commands are given to, None to give none.
    """

    robot: Robot
    joint_names: tuple[str, ...]
    config: ControlConfig
    realtime: RealtimeRequest
    sink: Callable | None
    sink_arguments: tuple
    descriptor: int
    capsules: str = ""
    gravity: str = ""

    def kernel(self) -> ControlKernel:
        """A kernel of this plan. Raises RobotError, GravityError."""
        capsules = CapsuleModel.from_yaml(self.capsules, self.joint_names) if self.capsules else None
        gravity = load_gravity(self.gravity, self.joint_names) if self.gravity else None
        return ControlKernel(self.robot, self.joint_names, self.config, capsules, gravity)


def layout(joints: int) -> dict[str, np.dtype]:
    """Mailboxes for J joints. All stamps are on the steady clock, ns; angles rad.

    joints, chunk, operator, orders go to the controller; command and report come from it. `offset` is what to add to a
    steady stamp to get one of the message clock.
    """
    row = (np.float64, (joints,))
    return {
        "joints": np.dtype([("stamp", np.int64), ("offset", np.int64), ("position", *row), ("effort", *row)]),
        "chunk": np.dtype(
            [("stamp", np.int64), ("dt", np.float64), ("points", np.int64),
             ("positions", np.float64, (MAX_POINTS, joints))]
        ),
        # NaN for a joint that the operator does not name
        "operator": np.dtype([("stamp", np.int64), ("position", *row)]),
        "orders": np.dtype(
            [("count", np.int64), ("kind", np.int64, (ORDERS_KEPT,)), ("value", np.float64, (ORDERS_KEPT,))]
        ),
        "command": np.dtype(
            [("stamp", np.int64), ("offset", np.int64), ("mode", np.int64),
             ("position", *row), ("velocity", *row), ("effort", *row)]
        ),
        "report": np.dtype(
            [("stamp", np.int64), ("began", np.int64), ("state", np.int64), ("mode", np.int64), ("speed", np.float64),
             ("chunk_stamp", np.int64), ("offset", np.int64), ("orders_done", np.int64), ("overruns", np.int64),
             ("sink_errors", np.int64), ("listened", np.int64), ("taken_over", np.int64), ("handed_back", np.int64),
             ("granted", np.int64, (4,)), ("counters", np.int64, (len(COUNTERS),)),
             ("rejected", np.int64, (len(REJECTIONS),)), ("late_maximum", np.int64), ("work_maximum", np.int64),
             ("reason", "S240"), ("rejection", "S240"), ("refusal", "S240"), ("recipe", "S640"), ("note", "S240"),
             ("lateness", np.int64, (BINS,)), ("work", np.int64, (BINS,))]
        ),
    }


def text(field: np.ndarray) -> str:
    """A text field of a record, which is cut to its size when longer."""
    return bytes(field.item()).decode(errors="replace")
