"""Recorder, replay and build as a user runs them: processes with parameters, exit codes and files."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from g1_engine import INSTRUCTION
from live import FakeRobot, wait_for
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import String

from vla_edge.engine.bundle import Bundle
from vla_edge.evaluate.bag import Bag
from vla_edge.nodes import convert, qos
from vla_edge.robots.g1 import DRIVEN_JOINTS

TOPICS = "[head/image, joint_states, instruction]"


@pytest.fixture
def recorded(start, peer, tmp_path):
    """A bag of a robot that stands still, recorded through the node."""
    robot = FakeRobot(peer)
    robot.positions = np.linspace(-0.2, 0.2, len(DRIVEN_JOINTS))
    words = peer.node.create_publisher(String, "instruction", qos.LATCHED)
    words.publish(String(data=INSTRUCTION))
    recorder = start("recorder_node", output=tmp_path / "bag", topics=TOPICS)
    try:
        wait_for(lambda: "recording to" in recorder.output, 30.0, "the recorder")
        time.sleep(4.0)
        assert recorder.stop() == 0
    finally:
        robot.close()
    return tmp_path / "bag", robot


def test_a_recording_is_read_back_as_what_was_seen(recorded):
    path, robot = recorded
    with Bag(path) as bag:
        assert not bag.storage.warnings
        frames = list(bag.frames(("head",), DRIVEN_JOINTS))
    assert len(frames) > 20
    observation = frames[-1].observation
    assert observation.instruction == INSTRUCTION
    np.testing.assert_allclose(observation.joints.position, robot.positions)
    # Noise is the hardest picture there is for JPEG; it is still that picture.
    seen = observation.images["head"].astype(float).ravel()
    assert np.corrcoef(seen, robot.pixels.astype(float).ravel())[0, 1] > 0.5


def test_what_served_is_told_in_the_metadata_and_each_camera_is_recorded_once(start, peer, bundle, tmp_path):
    robot = FakeRobot(peer)
    compressed = peer.node.create_publisher(CompressedImage, "head/image/compressed", qos.SENSOR_OUT)
    recorder = start("recorder_node", output=tmp_path / "bag", topics="[joint_states]", bundle=bundle)
    try:
        wait_for(lambda: "recording to" in recorder.output, 30.0, "the recorder")
        wait_for(lambda: compressed.get_subscription_count() > 0, 10.0, "its subscription")
        message = CompressedImage(format="jpeg", data=bytes(range(9)))
        for _ in range(5):
            compressed.publish(message)
            time.sleep(0.2)
        assert recorder.stop() == 0
    finally:
        robot.close()
    with Bag(tmp_path / "bag") as bag:
        assert bag.storage.metadata["vla_edge.manifest"] == (bundle / "manifest.yaml").read_text()
        (camera,) = (topic for topic in bag.storage.topics if "image" in topic)
        assert camera.endswith("/head/image/compressed")
        # the camera's own pictures, none of those made of the raw ones
        pictures = [bag.storage.deserialize(raw) for raw in bag.storage.messages({camera})]
    assert pictures and all(bytes(picture.data) == bytes(range(9)) for picture in pictures)


def test_a_bag_is_played_into_the_topics_in_real_time(recorded, start, peer):
    path, robot = recorded
    pictures = peer.listen(CompressedImage, "head/image/compressed", qos.STREAM)
    states = peer.listen(JointState, "joint_states", qos.STREAM)
    texts = peer.listen(String, "instruction", qos.LATCHED)
    before = len(states)
    begin_ns = time.time_ns()
    player = start("replay_node", bag=path, rate=2.0)
    assert player.wait(40.0) == 0
    wait_for(lambda: texts and pictures and len(states) > before, 5.0, "what was played")
    assert texts[-1].data == INSTRUCTION
    np.testing.assert_allclose(states[-1].position, robot.positions)
    assert begin_ns < convert.stamp_of(states[-1]) < time.time_ns() + 1_000_000_000
    with Bag(path) as bag:
        seconds = bag.duration_s
    assert time.time_ns() - begin_ns > seconds / 2 * 1e9


def test_an_engine_is_evaluated_on_a_bag(recorded, start, bundle, tmp_path):
    path, _ = recorded
    report = tmp_path / "report" / "replay.html"
    process = start("replay_node", bag=path, mode="evaluate", engine=bundle, max_frames=5, report=report)
    code = process.wait(90.0)
    assert report.is_file(), process.output
    told = json.loads(report.with_suffix(".json").read_text())
    # The code says whether the engine passed, nothing else.
    assert code == (0 if told["passed"] else 1)
    assert told["frames"] == 5 and set(told["action"]["per_joint"]) == set(DRIVEN_JOINTS)


@pytest.mark.parametrize(
    ("executable", "parameters", "says"),
    [
        ("replay_node", {}, "parameter bag is ''"),
        ("replay_node", {"bag": "/nowhere"}, "there is no bag at /nowhere"),
        ("replay_node", {"bag": "/nowhere", "mode": "evaluate"}, "parameter engine is ''"),
        ("replay_node", {"bag": "/nowhere", "rate": 0.0}, "parameter rate is 0.0"),
        ("recorder_node", {}, "parameter output is ''"),
        ("build_node", {}, "parameter checkpoint is ''"),
        ("build_node", {"checkpoint": "/nowhere"}, "there is no checkpoint directory /nowhere"),
    ],
)
def test_what_cannot_be_done_ends_with_one_sentence_and_code_1(start, executable, parameters, says):
    process = start(executable, **parameters)
    assert process.wait(40.0) == 1
    assert says in process.output and "Traceback" not in process.output


def test_a_bag_without_the_needed_topics_is_named(start, peer, tmp_path, bundle):
    recorder = start("recorder_node", output=tmp_path / "poor", topics="[instruction]")
    peer.node.create_publisher(String, "instruction", qos.LATCHED).publish(String(data=INSTRUCTION))
    wait_for(lambda: "recording to" in recorder.output, 30.0, "the recorder")
    time.sleep(2.0)
    assert recorder.stop() == 0
    process = start("replay_node", bag=tmp_path / "poor", mode="evaluate", engine=bundle)
    assert process.wait(40.0) == 1
    assert "lacks head/image" in process.output and "joint_states" in process.output


def test_the_build_node_builds_what_can_be_served(start, checkpoint, recorded, tmp_path):
    path, _ = recorded
    process = start("build_node", checkpoint=checkpoint, recipe="fp32", output=tmp_path / "engine", calibration=path)
    code = process.wait(150.0)
    assert code == 0, process.output
    assert "100 %" in process.output and "engine bundle ready" in process.output
    bundle = Bundle.load(tmp_path / "engine")
    assert tuple(bundle.spec.joint_names) == DRIVEN_JOINTS


def test_an_unknown_recipe_is_told_with_the_nearest(start, checkpoint):
    process = start("build_node", checkpoint=checkpoint, recipe="int9")
    assert process.wait(40.0) == 1
    assert "did you mean 'int8'" in process.output
