"""The controller before a G1: a fake robot that reads the frames as the real one does, and refuses what is dead."""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from lifecycle_msgs.msg import Transition
from live import wait_for
from std_msgs.msg import UInt8MultiArray
from trajectory_msgs.msg import JointTrajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "robots"))
from test_unitree_frame import CDR_HEADER, LOW_STATE_FORMAT, crc_bit_by_bit, unpack  # noqa: E402

from vla_edge.nodes import convert, qos  # noqa: E402
from vla_edge.nodes.client import ConductError  # noqa: E402
from vla_edge.robots.dex3 import HAND_JOINTS  # noqa: E402
from vla_edge.robots.g1 import DRIVEN_JOINTS, LEFT_ARM, RIGHT_ARM, g1  # noqa: E402
from vla_edge.types import ActionChunk  # noqa: E402

CONFIGURE, ACTIVATE = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE
ARMS = LEFT_ARM + RIGHT_ARM
PATIENT = {
    "joint_state_timeout": 2.0, "late_ticks": 100, "pause_ticks": 1000, "start_ramp": 0.2, "status_period": 0.1,
    "sink": "unitree_arm_sdk", "unitree_weight_ramp": 0.5, "command_rate": 50,
}


class FakeG1:
    """29 motors that go where arm_sdk and its weight say; its own controller would hold zero."""

    def __init__(self, peer, mode_machine=15):
        self.positions, self.frames = np.zeros(35), []
        self._mode_machine, self._end = mode_machine, threading.Event()
        self._state = peer.node.create_publisher(UInt8MultiArray, "lowstate", qos.SENSOR_OUT)
        peer.node.create_subscription(UInt8MultiArray, "arm_sdk", self._on_frame, qos.COMMAND, raw=True)
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()

    def _on_frame(self, frame: bytes) -> None:
        _, machine, motors, _ = unpack(frame)  # checks the checksum
        weight = motors[29, 1]
        alive = motors[15:29, 0] == 1
        if machine == self._mode_machine:
            self.positions[15:29] = np.where(alive, weight * motors[15:29, 1], self.positions[15:29])
        self.frames.append((machine, weight, motors[15:29].copy()))

    def _speak(self) -> None:
        while not self._end.is_set():
            motors = [value for q in self.positions for value in (1, q, 0.0, 0.0, 0.0, 40, 41, 24.0, *[0] * 7)]
            body = struct.pack(LOW_STATE_FORMAT[:-2] + "4I", 1, 0, 0, self._mode_machine, 7, *[0.0] * 13, 30, *motors,
                               *[0] * 44)
            crc = struct.pack("<I", crc_bit_by_bit(body))
            self._state.publish(CDR_HEADER + body[:70] + body[72:74] + body[76:] + crc)
            time.sleep(0.02)

    def close(self) -> None:
        self._end.set()
        self._thread.join(2.0)


@pytest.fixture
def stand_in(monkeypatch):
    path = str(Path(__file__).with_name("stand_in"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([path, os.environ.get("PYTHONPATH", "")]))


def rearm(peer):
    deadline = time.monotonic() + 10.0
    while True:
        try:
            return peer.call("controller/rearm")
        except ConductError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_the_arms_of_a_g1_are_taken_over_moved_and_given_back(start, peer, stand_in):
    robot = FakeG1(peer)
    try:
        start("lowstate_node")
        controller = start("controller_node", **PATIENT, joints=f"[{', '.join(ARMS)}]")
        assert peer.change("controller", CONFIGURE, ACTIVATE) == [True, True]
        rearm(peer)
        wait_for(lambda: robot.frames and robot.frames[-1][1] == 1.0, 10.0, "the weight to be led in")
        chunks = peer.node.create_publisher(JointTrajectory, "action_chunk", qos.chunk(0.2, 1.6))
        wait_for(chunks.get_subscription_count, 10.0, "the controller to listen")
        target = np.linspace(-0.1, 0.1, len(ARMS))
        ease = (1 - np.cos(np.pi * np.arange(1, 33) / 32))[:, None] / 2
        chunks.publish(convert.to_trajectory(ActionChunk(time.time_ns(), ARMS, target * ease, 0.05)))
        wait_for(lambda: np.abs(robot.positions[15:29] - target).max() < 0.02, 10.0, "the arms to arrive")
        assert controller.stop() == 0
        wait_for(lambda: robot.frames[-1][1] == 0.0, 5.0, "the weight to be led out")
    finally:
        robot.close()
    weights = np.array([weight for _, weight, _ in robot.frames])
    # 25 frames from 0 to 1 at 50 Hz in 0.5 s; a loaded machine may lose some on the way, but never all of a ramp.
    assert np.abs(np.diff(np.concatenate([[0.0], weights]))).max() < 0.5
    assert {machine for machine, _, _ in robot.frames} == {15}
    motors = np.array([motors for _, _, motors in robot.frames])
    assert (motors[:, :, 0] == 1).all() and (motors[:, :, 4] == 60.0).all()
    limits = g1().select(ARMS)
    assert (np.abs(np.diff(motors[:, :, 1], axis=0)) <= limits.column("velocity") * 0.02 * 12).all()


def test_a_driven_hand_is_measured_commanded_and_missed_when_it_falls_silent(start, peer, stand_in):
    robot, heard, silent = FakeG1(peer), [], threading.Event()
    fingers = HAND_JOINTS["left"]
    state = peer.node.create_publisher(UInt8MultiArray, "dex3/left/state", qos.SENSOR_OUT)
    peer.node.create_subscription(UInt8MultiArray, "dex3/left/cmd", heard.append, qos.COMMAND, raw=True)
    frame = CDR_HEADER + struct.pack("<I", 7) + struct.pack("<B3x4f2hf7I", 1, 0.01, 0, 0, 0, 30, 30, 24.0, *[0] * 7) * 7
    timer = peer.node.create_timer(0.02, lambda: silent.is_set() or state.publish(frame))
    try:
        # A right hand that says nothing must not matter: only the left one's robot is described.
        start("lowstate_node", robot="g1+dex3", hand_timeout=1.0)
        joints = ", ".join((*LEFT_ARM, *fingers))
        start("controller_node", **PATIENT, robot="g1+dex3", joints=f"[{joints}]")
        assert peer.change("controller", CONFIGURE, ACTIVATE) == [True, True]
        rearm(peer)
        wait_for(lambda: len(heard) > 5, 10.0, "commands to the hand")
        length, *motors = struct.unpack("<I" + "B3x5fI" * 7, heard[-1][4:-16])
        assert length == 7 and [motors[7 * i] for i in range(7)] == [0x10 | i for i in range(7)]
        assert motors[1] == pytest.approx(0.01, abs=0.03) and motors[4] == pytest.approx(1.5)
        silent.set()
        peer.diagnostics("controller", lambda values: values["mode"] == "FAULT")
    finally:
        peer.node.destroy_timer(timer)
        robot.close()


@pytest.mark.parametrize(
    ("parameters", "mode_machine", "says"),
    [
        ({}, 5, "start with robot:=g1:5"),
        ({"joints": "[left_knee_joint]"}, 15, "leaves to the robot's balance"),
        ({"unitree_mode_pr": 1, "joints": "[waist_roll_joint]", "unitree_waist": "true"}, 15, "AB mode"),
    ],
)
def test_a_robot_that_is_not_the_one_described_fails_configure(start, peer, stand_in, parameters, mode_machine, says):
    robot = FakeG1(peer, mode_machine)
    try:
        process = start("controller_node", **{**PATIENT, **parameters})
        assert peer.change("controller", CONFIGURE) == [False]
    finally:
        robot.close()
    assert says in process.output and not robot.frames


def test_without_unitrees_messages_its_sinks_are_refused_with_what_to_install(start, peer):
    process = start("controller_node", **PATIENT)
    assert peer.change("controller", CONFIGURE) == [False]
    assert "unitree_hg" in process.output and "unitree_ros2" in process.output


def test_a_second_controller_of_one_robot_is_refused(start, peer):
    quiet = {"status_period": 0.1}
    start("controller_node", **quiet)
    assert peer.change("controller", CONFIGURE) == [True]
    second = start("controller_node", __node="other", **quiet)
    assert peer.change("other", CONFIGURE) == [False]
    assert "another controller on this machine" in second.output


def test_a_robot_that_somebody_else_commands_is_refused(start, peer):
    from sensor_msgs.msg import JointState

    stranger = peer.node.create_publisher(JointState, "joint_command", qos.COMMAND)
    timer = peer.node.create_timer(0.02, lambda: stranger.publish(JointState(name=list(DRIVEN_JOINTS))))
    process = start("controller_node", status_period=0.1)
    assert peer.change("controller", CONFIGURE) == [False]
    peer.node.destroy_timer(timer)
    assert "commanded already, by" in process.output and "peer" in process.output
