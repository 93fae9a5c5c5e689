"""The controller node in processes of its own: it moves the robot within limits, and holds it when anything fails."""

from __future__ import annotations

import math
import os
import signal
import time

import numpy as np
import pytest
from lifecycle_msgs.msg import Transition
from live import FakeRobot, wait_for
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64, Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from vla_edge.nodes import convert, qos
from vla_edge.nodes.client import ConductError
from vla_edge.robots.g1 import DRIVEN_JOINTS, g1
from vla_edge.types import ActionChunk

CONFIGURE, ACTIVATE = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE
# A loaded test machine must not look like a dead robot.
PATIENT = {
    "joint_state_timeout": 1.0, "late_ticks": 100, "pause_ticks": 1000, "start_ramp": 0.2, "status_period": 0.1,
}


class Arms:
    """A controller before joints that go where they are told."""

    def __init__(self, start, peer, **parameters):
        self.peer = peer
        self.commands: list[tuple[float, JointState]] = []
        self.follows = True
        peer.node.create_subscription(JointState, "joint_command", self._follow, qos.COMMAND)
        self.robot = FakeRobot(peer, camera_rate=0.5, joint_rate=200.0)
        self.robot.frames = False
        self.chunk = peer.node.create_publisher(JointTrajectory, "action_chunk", qos.chunk(0.2, 1.6))
        self.process = start("controller_node", **{**PATIENT, **parameters})
        assert peer.change("controller", CONFIGURE, ACTIVATE) == [True, True]

    def _follow(self, message: JointState) -> None:
        self.commands.append((time.monotonic(), message))
        if self.follows:
            self.robot.positions = np.array(message.position)

    def arm(self) -> None:
        # The robot's own stream and the controller may still be finding each other.
        deadline = time.monotonic() + 10.0
        while True:
            try:
                self.peer.call("controller/rearm")
                break
            except ConductError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        count = len(self.commands)
        wait_for(lambda: len(self.commands) > count, 10.0, "commands")

    def send(self, target: np.ndarray, dt: float = 0.05, names=DRIVEN_JOINTS, stamp_ns: int | None = None) -> None:
        """A chunk of 32 points that ease from where the robot is to `target`."""
        ease = (1 - np.cos(np.pi * np.arange(1, 33) / 32))[:, None] / 2
        positions = self.robot.positions + (target - self.robot.positions) * ease
        stamp_ns = time.time_ns() if stamp_ns is None else stamp_ns
        self.chunk.publish(convert.to_trajectory(ActionChunk(stamp_ns, tuple(names), positions, dt)))

    def says(self, **wanted: str) -> dict[str, str]:
        return self.peer.diagnostics("controller", lambda v: all(v[key] == value for key, value in wanted.items()))

    def keeps_to_velocities(self) -> bool:
        """Whether every command moved by no more than the working velocity allows for the time since the last."""
        messages = [message for _, message in list(self.commands)]
        seconds = np.diff([convert.stamp_of(message) for message in messages]) / 1e9
        steps = np.abs(np.diff([message.position for message in messages], axis=0))
        limit = g1().select(DRIVEN_JOINTS).column("velocity")
        return bool((steps <= limit * seconds[:, None] * 1.01 + 1e-6).all())

    def keeps_to_accelerations(self) -> bool:
        """Whether the velocity changed by no more than the working acceleration allows: what begins is led in."""
        messages = [message for _, message in list(self.commands)]
        seconds = np.diff([convert.stamp_of(message) for message in messages]) / 1e9
        changes = np.abs(np.diff([message.velocity for message in messages], axis=0))
        limit = g1().select(DRIVEN_JOINTS).column("acceleration")
        return bool((changes <= limit * seconds[:, None] * 1.01 + 1e-6).all())


@pytest.fixture
def arms(start, peer):
    arms = Arms(start, peer)
    yield arms
    arms.robot.close()


def test_a_chunk_is_followed_smoothly_to_its_end_and_then_held(arms):
    arms.arm()
    time.sleep(0.5)
    target = np.linspace(-0.2, 0.2, len(DRIVEN_JOINTS))
    arms.send(target)
    arms.says(mode="FOLLOW")
    arms.says(mode="HOLD")
    np.testing.assert_allclose(arms.commands[-1][1].position, target, atol=0.02)
    commands = [message for _, message in list(arms.commands)]  # more come all the time
    stamps = np.array([convert.stamp_of(message) for message in commands]) / 1e9
    rate = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    # Never faster than asked; how much slower is the machine's affair.
    assert 50.0 < rate < 550.0
    assert arms.keeps_to_velocities()


def test_nothing_is_commanded_before_the_controller_is_armed(arms):
    arms.send(np.full(len(DRIVEN_JOINTS), 0.1))
    time.sleep(1.0)
    assert not arms.commands
    assert int(arms.says(mode="INIT")["rejected.chunk.mode"]) >= 1


def bad(kind: str) -> JointTrajectory:
    chunk = ActionChunk(time.time_ns(), DRIVEN_JOINTS, np.zeros((32, len(DRIVEN_JOINTS))), 0.05)
    message = convert.to_trajectory(chunk)
    if kind == "nan":
        message.points[7].positions[3] = math.nan
    elif kind == "infinite":
        message.points[0].positions[0] = math.inf
    elif kind == "joints":
        message.joint_names = ["tail_joint", *message.joint_names[1:]]
    elif kind == "empty":
        message.points = []
    elif kind == "ragged":
        message.points[4].positions = message.points[4].positions[:-1]
    elif kind == "uneven":
        message.points[9].time_from_start.nanosec += 20_000_000
    elif kind == "far":
        for point in message.points:
            point.positions[3] = 1.5
    elif kind == "old":
        message.header.stamp = convert.to_time(chunk.stamp_ns - 5_000_000_000)
    elif kind == "future":
        message.header.stamp = convert.to_time(chunk.stamp_ns + 5_000_000_000)
    return message


def test_an_impossible_chunk_is_refused_as_a_whole_counted_and_changes_nothing(arms):
    arms.arm()
    time.sleep(0.4)
    before, count = np.array(arms.commands[-1][1].position), 0

    def refused(values: dict[str, str]) -> bool:
        return sum(int(v) for key, v in values.items() if key.startswith("rejected.chunk") and v) >= count

    for kind in ("nan", "infinite", "joints", "empty", "ragged", "uneven", "far", "old", "future"):
        count += 1
        arms.chunk.publish(bad(kind))
        values = arms.peer.diagnostics("controller", refused)
        assert values["mode"] == "HOLD" and values["chunks.accepted"] == "0", kind
        np.testing.assert_allclose(arms.commands[-1][1].position, before, atol=1e-9, err_msg=kind)
    # It goes on working.
    arms.send(np.full(len(DRIVEN_JOINTS), 0.05))
    arms.says(mode="FOLLOW")


def test_joints_in_another_order_move_the_right_joints(arms):
    measured = np.linspace(-0.2, 0.2, len(DRIVEN_JOINTS))
    arms.robot.names, arms.robot.positions = list(reversed(DRIVEN_JOINTS)), measured[::-1].copy()
    arms.follows = False
    time.sleep(0.5)
    arms.arm()
    command = arms.commands[-1][1]
    assert dict(zip(command.name, command.position)) == pytest.approx(dict(zip(DRIVEN_JOINTS, measured)))


@pytest.mark.parametrize("kind", ("silent", "nan", "foreign"))
def test_joint_states_that_stop_or_cannot_be_used_freeze_the_robot_until_it_is_rearmed(arms, kind):
    arms.arm()
    arms.send(np.full(len(DRIVEN_JOINTS), 0.3))
    arms.says(mode="FOLLOW")
    if kind == "silent":
        arms.robot.joints = False
    elif kind == "nan":
        arms.follows, arms.robot.positions = False, np.full(len(DRIVEN_JOINTS), math.nan)
        assert int(arms.says(mode="FAULT")["rejected.joint_states"]) >= 10
    else:
        arms.robot.names = [f"their_{name}" for name in DRIVEN_JOINTS]
    arms.says(mode="FAULT")
    # Braked within limits, not stopped dead or dropped.
    assert arms.keeps_to_velocities()
    arms.robot.joints, arms.robot.names, arms.follows = True, list(DRIVEN_JOINTS), True
    arms.robot.positions = np.array(arms.commands[-1][1].position)
    arms.send(np.zeros(len(DRIVEN_JOINTS)))
    time.sleep(0.5)
    arms.says(mode="FAULT")  # good data alone do not end a fault
    arms.arm()
    arms.says(mode="HOLD")


def test_hold_is_left_only_when_it_is_resumed(arms):
    arms.arm()
    arms.peer.call("controller/hold")
    arms.send(np.full(len(DRIVEN_JOINTS), 0.1))
    assert int(arms.says(**{"rejected.chunk.held": "1"})["chunks.accepted"]) == 0
    arms.peer.call("controller/start")
    arms.send(np.full(len(DRIVEN_JOINTS), 0.1))
    arms.says(mode="FOLLOW")


def test_emergency_stop_brakes_and_forbids_rearming_until_released(arms):
    stop = arms.peer.node.create_publisher(Bool, "emergency_stop", qos.LATCHED)
    arms.arm()
    arms.send(np.full(len(DRIVEN_JOINTS), 0.3))
    arms.says(mode="FOLLOW")
    stop.publish(Bool(data=True))
    arms.says(mode="FAULT")
    with pytest.raises(ConductError, match="emergency stop is pressed"):
        arms.peer.call("controller/rearm")
    stop.publish(Bool(data=False))
    time.sleep(0.3)
    arms.arm()
    arms.says(mode="HOLD")
    assert arms.keeps_to_velocities()


def test_a_speed_scale_that_is_no_fraction_is_refused(arms):
    scale = arms.peer.node.create_publisher(Float64, "speed_scale", qos.LATCHED)
    scale.publish(Float64(data=7.0))
    values = arms.peer.diagnostics("controller", lambda v: "speed_scale" in v["last_problem"])
    assert "from 0 to 1" in values["last_problem"]


def children_of(node) -> list[str]:
    """Process numbers of what a node has started: of a controller, the real-time process."""
    pid = node.process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_the_controller_runs_without_torch(arms):
    maps = open(f"/proc/{arms.process.pid}/maps").read()
    children = children_of(arms)
    assert children
    for child in children:
        maps += open(f"/proc/{child}/maps").read()
    assert "libtorch" not in maps and "onnxruntime" not in maps


def test_when_the_real_time_process_dies_the_node_says_so(arms):
    (child,) = children_of(arms)
    os.kill(int(child), signal.SIGKILL)
    values = arms.peer.diagnostics("controller", lambda v: "gone" in v["message"])
    assert "restart this node" in values["message"]


def test_the_real_time_process_ends_with_its_node(arms):
    (child,) = children_of(arms)
    arms.arm()
    arms.process.kill()
    wait_for(lambda: not os.path.exists(f"/proc/{child}"), 10.0, "the controller's process to end")


def test_it_arms_by_itself_only_once_somebody_listens_to_the_commands(start, peer):
    robot = FakeRobot(peer, camera_rate=0.5, joint_rate=100.0)
    try:
        start("controller_node", rearm_on_activate="true", **PATIENT)
        assert peer.change("controller", CONFIGURE, ACTIVATE) == [True, True]
        peer.diagnostics("controller", lambda v: v["listened"] == "false" and "nobody listens" in v["message"])
        time.sleep(1.0)
        values = peer.diagnostics("controller")
        assert values["mode"] == "INIT"
        with pytest.raises(ConductError, match="nobody listens"):
            peer.call("controller/rearm")
        heard = peer.listen(JointState, "joint_command", qos.COMMAND)
        peer.diagnostics("controller", lambda v: v["mode"] == "HOLD" and v["listened"] == "true")
        wait_for(lambda: heard, 10.0, "commands")
    finally:
        robot.close()


def test_an_emergency_stop_ends_the_wish_to_arm_by_itself(start, peer):
    robot = FakeRobot(peer, camera_rate=0.5, joint_rate=100.0)
    stop = peer.node.create_publisher(Bool, "emergency_stop", qos.LATCHED)
    stop.publish(Bool(data=True))
    heard = peer.listen(JointState, "joint_command", qos.COMMAND)
    try:
        start("controller_node", rearm_on_activate="true", **PATIENT)
        assert peer.change("controller", CONFIGURE) == [True]
        wait_for(stop.get_subscription_count, 10.0, "the controller to listen")
        time.sleep(1.0)
        assert peer.change("controller", ACTIVATE) == [True]
        peer.diagnostics("controller", lambda v: "emergency stop is pressed" in v["last_problem"])
        stop.publish(Bool(data=False))
        time.sleep(2.0)
        assert peer.diagnostics("controller")["mode"] == "INIT" and not heard
        peer.call("controller/rearm")
        wait_for(lambda: heard, 10.0, "commands")
    finally:
        robot.close()


def test_no_thread_of_the_real_time_process_waits_behind_ordinary_load(arms):
    (child,) = children_of(arms)
    if "real-time scheduling was refused" in arms.peer.diagnostics("controller")["realtime"]:
        pytest.skip("real-time scheduling is not granted here")
    threads = [int(thread) for thread in os.listdir(f"/proc/{child}/task")]
    threads = {thread: os.sched_getparam(thread).sched_priority for thread in threads}
    # The middleware's threads hold locks that the loop waits for: right behind it, before everything else.
    assert len(threads) > 1 and threads.pop(int(child)) == 50
    assert set(threads.values()) == {49}


def test_no_process_of_the_controller_waits_for_the_shared_memory_of_others(arms):
    (child,) = children_of(arms)
    for pid in (arms.process.pid, child):
        mapped = open(f"/proc/{pid}/maps").read()
        assert "librmw" in mapped and "/dev/shm/fastrtps" not in mapped


def test_commands_can_be_given_as_an_array(start, peer):
    heard = peer.listen(Float64MultiArray, "joint_command", qos.COMMAND)
    robot = FakeRobot(peer, camera_rate=0.5, joint_rate=100.0)
    try:
        start("controller_node", sink="float64_multi_array", rearm_on_activate="true", **PATIENT)
        assert peer.change("controller", CONFIGURE, ACTIVATE) == [True, True]
        wait_for(lambda: heard, 10.0, "commands")
        assert len(heard[-1].data) == len(DRIVEN_JOINTS)
    finally:
        robot.close()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"tick_rate": 5000}, "parameter tick_rate is 5000, allowed is a whole number from 100 to 2000"),
        ({"command_rate": 300}, "command_rate is 300 Hz, which does not divide tick_rate"),
        ({"joints": "[left_elbow_joint, tail_joint]"}, "no joint 'tail_joint'"),
        ({"robot": "r2d2"}, "robot 'r2d2' is not known"),
        ({"sink": "smoke"}, "one of joint_state"),
        ({"position_margin": float("nan")}, "parameter position_margin is nan"),
    ],
)
def test_a_bad_parameter_fails_configure_with_its_name_value_and_range(start, peer, parameters, says):
    process = start("controller_node", **parameters)
    assert peer.change("controller", CONFIGURE) == [False]
    assert says in process.output
    assert process.running and process.stop() == 0
