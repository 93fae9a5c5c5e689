"""The VLA node while things change or fail around it: engines, policies, instructions, heat, cameras, and itself."""

from __future__ import annotations

import shutil
import signal
import time

import numpy as np
import pytest
from g1_engine import INSTRUCTION
from lifecycle_msgs.msg import Transition
from live import FakeRobot, wait_for
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Header, String
from trajectory_msgs.msg import JointTrajectory

from vla_edge.nodes import convert, qos
from vla_edge.nodes.client import ConductError

CONFIGURE, ACTIVATE = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE


@pytest.fixture
def robot(peer):
    robot = FakeRobot(peer)
    yield robot
    robot.close()


@pytest.fixture
def serve(start, peer, robot, bundle):
    """Starts a node that serves; returns it and the chunks it publishes."""
    chunks = peer.listen(JointTrajectory, "action_chunk", qos.CHUNK_IN)
    peer.node.create_publisher(String, "instruction", qos.LATCHED).publish(String(data=INSTRUCTION))

    def serve(**parameters):
        process = start("vla_node", bundle=bundle, rate=10.0, status_period=0.1, **parameters)
        assert peer.change("vla", CONFIGURE, ACTIVATE) == [True, True]
        count = len(chunks)
        wait_for(lambda: len(chunks) >= count + 2, 20.0, "chunks")
        return process, chunks

    return serve


def test_an_engine_is_exchanged_while_it_serves_and_a_damaged_one_is_not_taken(serve, peer, bundle, tmp_path):
    process, chunks = serve()
    good, damaged = tmp_path / "good", tmp_path / "damaged"
    for path in (good, damaged):
        shutil.copytree(bundle, path)
    with (damaged / "denoise.onnx").open("ab") as file:
        file.write(b"more")
    assert peer.set_parameter("vla", "bundle", str(damaged)) == ""
    values = peer.diagnostics("vla", lambda values: "SHA-256" in values["engine.swap"])
    assert values["engine.path"] == str(bundle) and values["serving"] == "true"
    assert peer.set_parameter("vla", "bundle", str(good)) == ""
    peer.diagnostics("vla", lambda values: values["engine.path"] == str(good))
    count = len(chunks)
    wait_for(lambda: len(chunks) >= count + 3, 10.0, "chunks of the new engine")
    stamps = [convert.stamp_of(chunk) for chunk in chunks]
    assert stamps == sorted(set(stamps))
    assert process.stop(number=signal.SIGTERM) == 0 and "Traceback" not in process.output


def test_the_inference_policy_is_switched_while_it_serves(serve, peer):
    _, chunks = serve(inference="asynchronous")
    assert "did you mean 'real_time_chunking'" in peer.set_parameter("vla", "inference", "real_time_chunkin")
    assert peer.set_parameter("vla", "inference", "synchronous: {execute: 0.1, settle: 0.0}") == ""
    peer.diagnostics("vla", lambda values: values["inference"].startswith("synchronous"))
    count = len(chunks)
    wait_for(lambda: len(chunks) >= count + 3, 10.0, "chunks that stop after two rows")
    positions = convert.to_chunk(chunks[-1]).positions
    assert np.all(positions[-1] == positions[-10]) and float(peer.diagnostics("vla")["delay_ms.p95"]) > 0.0


def test_a_bad_inference_policy_or_a_damaged_lighter_bundle_fails_configure(start, peer, bundle):
    process = start("vla_node", bundle=bundle, inference="'offset_cancel: {fade: 0}'")
    assert peer.change("vla", CONFIGURE) == [False]
    assert "fade is 0.0; it must be above 0" in process.output
    process.kill()
    process = start("vla_node", bundle=bundle, lighter_bundles="['/nowhere']")
    assert peer.change("vla", CONFIGURE) == [False]
    assert "there is no bundle /nowhere" in process.output


def test_heat_steps_down_to_the_lighter_bundle_and_back(serve, peer, bundle, tmp_path, monkeypatch):
    # What a Jetson tells, from a program of the same name.
    (tmp_path / "bin").mkdir()
    program, reading = tmp_path / "bin" / "tegrastats", tmp_path / "reading"
    reading.write_text("gpu@40C")
    program.write_text(f"#!/bin/sh\nwhile sleep 0.1; do cat {reading}; echo; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    lighter = tmp_path / "lighter"
    shutil.copytree(bundle, lighter)
    process, chunks = serve(lighter_bundles=f"['{lighter}']", derate_after=0.3, recover_after=0.3)
    assert peer.diagnostics("vla", lambda values: values["heat.celsius"])["engine.level"] == "0"
    reading.write_text("gpu@95C")
    values = peer.diagnostics("vla", lambda values: values["engine.path"] == str(lighter))
    assert values["engine.derated"] == "tegra.gpu is at 95 degrees" and "a lighter engine serves" in values["message"]
    reading.write_text("gpu@50C")
    peer.diagnostics("vla", lambda values: values["engine.path"] == str(bundle) and values["engine.derated"] == "")
    count = len(chunks)
    wait_for(lambda: len(chunks) >= count + 2, 10.0, "chunks")
    assert process.stop() == 0


def test_one_picture_for_ever_is_a_camera_that_froze(serve, peer, robot):
    _, chunks = serve(frozen_after=1.0)
    peer.diagnostics("vla", lambda values: "camera head shows one picture" in values["message"])
    robot.pixels = robot.pixels[::-1].copy()
    count = len(chunks)
    wait_for(lambda: len(chunks) > count, 10.0, "a chunk for the new picture")


def test_delayed_and_reordered_images_give_chunks_in_order_and_their_delay_is_measured(serve, peer, robot):
    _, chunks = serve()
    robot.frames = False
    images = peer.node.create_publisher(Image, "head/image", qos.SENSOR_OUT)
    wait_for(lambda: images.get_subscription_count() > 0, 10.0, "the subscriber")
    begin, taken = len(chunks), []
    for index in range(70):
        taken.append(time.time_ns())
        time.sleep(0.03)
        if index >= 7:  # 150 ms old by now, and every second one overtaken by the next
            late = taken[index - 5 if index % 2 else index - 7]
            images.publish(convert.to_image(late, "head", robot.pixels))
    values = peer.diagnostics("vla", lambda values: float(values["delay_ms.max"]) > 150.0)
    assert int(values["late.camera head"]) > 5
    stamps = [convert.stamp_of(chunk) for chunk in chunks[begin:]]
    assert len(stamps) > 5 and stamps == sorted(set(stamps))


def test_its_heart_beats_while_it_serves_and_stops_with_it(serve, peer):
    beats = peer.listen(Header, "vla/heartbeat", qos.heartbeat(0.2))
    process, _ = serve()
    wait_for(lambda: beats and beats[-1].frame_id == "ready", 10.0, "beats")
    peer.call("vla/stop")
    wait_for(lambda: beats[-1].frame_id == "stopped", 10.0, "another state")
    process.kill()
    time.sleep(0.5)
    count = len(beats)
    time.sleep(1.0)
    assert len(beats) == count


@pytest.mark.parametrize("what", ["node", "camera"])
def test_the_robot_holds_when_its_policy_dies_or_sees_nothing_and_goes_on_by_itself(serve, start, peer, robot, what):
    def follow(message: JointState) -> None:
        robot.positions = np.array(message.position)

    peer.node.create_subscription(JointState, "joint_command", follow, qos.COMMAND)
    start("controller_node", joint_state_timeout=5.0, late_ticks=100, pause_ticks=1000, start_ramp=0.2,
          status_period=0.1, max_first_step=3.0, chunk_velocity_ratio=100.0)  # fmt: skip
    assert peer.change("controller", CONFIGURE, ACTIVATE) == [True, True]
    process, _ = serve(inference="real_time_chunking")

    def rearmed():
        try:
            peer.call("controller/rearm")
        except ConductError:
            return False
        return True

    wait_for(rearmed, 10.0, "the controller to be armed")
    peer.diagnostics("controller", lambda values: values["mode"] == "FOLLOW")
    if what == "node":
        process.kill()
    else:
        robot.frames = False
    # 1.6 s of chunk, 0.1 s of grace, and what a loaded machine takes to say so.
    peer.diagnostics("controller", lambda values: values["mode"] == "HOLD", 10.0)

    def stands() -> bool:
        before = robot.positions.copy()
        time.sleep(0.3)
        return np.allclose(robot.positions, before, atol=1e-6)

    wait_for(stands, 5.0, "the robot to stand, having braked")
    if what == "node":
        serve(inference="real_time_chunking")
    robot.frames = True
    assert peer.diagnostics("controller", lambda values: values["mode"] == "FOLLOW")["faults"] == "0"
