"""The VLA node in a process of its own: what it serves, and what it does with what it must not use."""

from __future__ import annotations

import time

import numpy as np
import pytest
from g1_engine import INSTRUCTION
from lifecycle_msgs.msg import Transition
from live import FakeRobot, wait_for
from sensor_msgs.msg import Image
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from vla_edge.nodes import convert, qos
from vla_edge.robots.g1 import DRIVEN_JOINTS

CONFIGURE, ACTIVATE = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE
DEACTIVATE, CLEANUP = Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP


class Stage:
    """A served policy before a robot that stands still."""

    def __init__(self, start, peer, bundle, **parameters):
        self.peer = peer
        self.chunks = peer.listen(JointTrajectory, "action_chunk", qos.CHUNK_IN)
        self.robot = FakeRobot(peer)
        self.instruction = peer.node.create_publisher(String, "instruction", qos.LATCHED)
        self.process = start("vla_node", bundle=bundle, rate=10.0, status_period=0.2, **parameters)
        assert peer.change("vla", CONFIGURE, ACTIVATE) == [True, True]

    def say(self, text: str) -> None:
        self.instruction.publish(String(data=text))

    def serves(self, timeout: float = 15.0) -> None:
        """Waits for chunks to come."""
        count = len(self.chunks)
        wait_for(lambda: len(self.chunks) >= count + 2, timeout, "chunks")

    def is_silent(self) -> None:
        """Waits for chunks to stop coming."""

        def silent():
            count = len(self.chunks)
            time.sleep(1.0)
            return len(self.chunks) == count

        wait_for(silent, 10.0, "silence")


@pytest.fixture
def stage(start, peer, bundle):
    stage = Stage(start, peer, bundle)
    yield stage
    stage.robot.close()


def test_a_chunk_answers_the_observation_whose_stamp_it_carries(stage):
    # Warm-up has run by now, and whatever it computed must not have been published.
    assert not stage.chunks
    stage.robot.positions = np.linspace(-0.3, 0.3, len(DRIVEN_JOINTS))
    time.sleep(0.3)
    before_ns = time.time_ns()
    stage.say(INSTRUCTION)
    stage.serves()
    chunk = convert.to_chunk(stage.chunks[-1])
    assert chunk.joint_names == DRIVEN_JOINTS and chunk.dt == pytest.approx(0.05)
    assert chunk.positions.shape == (32, len(DRIVEN_JOINTS)) and np.isfinite(chunk.positions).all()
    assert before_ns - 2e8 < chunk.stamp_ns < time.time_ns()
    # Offsets of this policy are small, and were added to where the joints were measured.
    assert np.abs(chunk.positions - stage.robot.positions).max() < 0.15
    first = stage.chunks[-1].points[0].time_from_start
    assert (first.sec, first.nanosec) == (0, 50_000_000)


def test_diagnostics_tell_every_stage_and_the_engine(stage):
    stage.say(INSTRUCTION)
    values = stage.peer.diagnostics("vla", lambda values: float(values["chunks"]) > 15)
    for name in ("vision", "prefix", "denoise", "engine", "preprocess"):
        assert float(values[f"stage.{name}_ms.p50"]) > 0.0
    assert float(values["observation_to_chunk_ms.p50"]) >= float(values["stage.engine_ms.p50"])
    assert values["engine.backend"] == "onnxruntime" and values["state"] == "ready"
    assert float(values["rate_hz"]) == pytest.approx(10.0, abs=5.0)


def bad_image(kind: str, pixels: np.ndarray) -> Image:
    message = convert.to_image(time.time_ns(), "head", pixels)
    if kind == "size":
        message = convert.to_image(time.time_ns(), "head", np.ascontiguousarray(pixels[::2, ::2]))
    elif kind == "encoding":
        message.encoding = "32FC1"
    elif kind == "short":
        message.data = message.data[:-1]
    return message


def test_a_wrong_image_is_refused_counted_and_forgotten(stage):
    stage.say(INSTRUCTION)
    stage.serves()
    publisher, count = stage.peer.node.create_publisher(Image, "head/image", qos.SENSOR_OUT), 0
    for kind, says in (("size", "320x240"), ("encoding", "32FC1"), ("short", "bytes")):
        stage.robot.frames = False
        for _ in range(25):
            publisher.publish(bad_image(kind, stage.robot.pixels))
            time.sleep(0.02)
        values = stage.peer.diagnostics("vla", lambda values, says=says: says in values["last_problem"])
        assert int(values["rejected.camera head"]) >= count + 10
        count = int(values["rejected.camera head"])
        stage.is_silent()
        stage.robot.frames = True
        stage.serves()


def test_joint_states_that_are_not_finite_are_refused_and_no_chunk_is_made_of_them(stage):
    stage.say(INSTRUCTION)
    stage.serves()
    stage.robot.positions = np.full(len(DRIVEN_JOINTS), np.nan)
    values = stage.peer.diagnostics("vla", lambda values: int(values.get("rejected.joint states", 0)) > 50)
    assert "not finite" in values["last_problem"]
    stage.is_silent()
    stage.robot.positions = np.zeros(len(DRIVEN_JOINTS))
    stage.serves()


def test_joints_in_another_order_are_matched_by_name(stage):
    positions = np.linspace(-0.3, 0.3, len(DRIVEN_JOINTS))
    stage.robot.names = list(reversed(DRIVEN_JOINTS))
    stage.robot.positions = positions[::-1].copy()
    stage.say(INSTRUCTION)
    time.sleep(0.5)
    stage.serves()
    chunk = convert.to_chunk(stage.chunks[-1])
    assert chunk.joint_names == DRIVEN_JOINTS
    assert np.abs(chunk.positions - positions).max() < 0.15


def test_joint_states_without_a_joint_of_the_policy_are_refused(stage):
    stage.robot.names = ["somebody_elses_joint", *DRIVEN_JOINTS[1:]]
    time.sleep(1.0)  # until no good joint state of before is left
    stage.say(INSTRUCTION)
    values = stage.peer.diagnostics("vla", lambda values: int(values.get("rejected.joint states", 0)) > 50)
    assert DRIVEN_JOINTS[0] in values["last_problem"]
    assert not stage.chunks


def test_an_instruction_the_policy_does_not_know_is_refused_and_the_robot_left_in_peace(stage):
    for count, text in enumerate(("", "   ", "touch " * 3000, "нажми на красный куб", "触摸红色的方块"), start=1):
        stage.say(INSTRUCTION)
        stage.serves()
        stage.say(text)
        refused = str(count)
        stage.peer.diagnostics("vla", lambda values, refused=refused: values.get("rejected.instruction") == refused)
        stage.is_silent()


def test_nothing_is_served_before_start_after_stop_or_while_inactive(start, peer, bundle):
    stage = Stage(start, peer, bundle, start_on_activate="false")
    try:
        stage.say(INSTRUCTION)
        time.sleep(1.0)
        assert not stage.chunks
        peer.call("vla/start")
        stage.serves()
        peer.call("vla/stop")
        count = len(stage.chunks)
        time.sleep(1.0)
        assert len(stage.chunks) <= count + 1  # one may still have been on its way
        peer.call("vla/start")
        stage.serves()
        assert peer.change("vla", DEACTIVATE) == [True]
        stage.is_silent()
        assert peer.change("vla", CLEANUP, CONFIGURE, ACTIVATE) == [True, True, True]
        peer.call("vla/start")
        stage.serves(20.0)
        assert stage.process.stop() == 0
    finally:
        stage.robot.close()


def test_a_camera_that_freezes_ends_the_chunks(stage):
    stage.say(INSTRUCTION)
    stage.serves()
    stage.robot.frames = False
    values = stage.peer.diagnostics("vla", lambda values: values["state"] == "stale")
    assert "camera head silent" in values["message"]
    stage.is_silent()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"bundle": "/nowhere"}, "/nowhere"),
        ({"rate": 0.0}, "parameter rate is 0.0, allowed is a number from 0.1 to 100"),
        ({"rate": "fast"}, "parameter rate is 'fast'"),
        ({"image_transport": "smoke"}, "one of raw, compressed"),
        ({}, "parameter bundle"),
    ],
)
def test_a_bad_parameter_fails_configure_with_its_name_value_and_range(start, peer, bundle, parameters, says):
    given = parameters if "bundle" in parameters or not parameters else {"bundle": bundle, **parameters}
    process = start("vla_node", **given)
    assert peer.change("vla", CONFIGURE) == [False]
    assert says in process.output
    assert process.running and process.stop() == 0
