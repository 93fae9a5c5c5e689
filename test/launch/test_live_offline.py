"""The same recording through the nodes, on its own clock, and through the library: the same chunks."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from g1_engine import INSTRUCTION
from live import wait_for
from trajectory_msgs.msg import JointTrajectory

from vla_edge.evaluate.bag_writer import BagWriter
from vla_edge.evaluate.parity import compare_chunks
from vla_edge.nodes import convert, qos
from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.types import ActionChunk, JointState

START_NS, SECONDS, CAMERA_HZ, JOINT_HZ = 1_700_000_000_000_000_000, 8.0, 5, 50
# What a picture needs to arrive; its joints are here long before it.
CAMERA_DELAY_NS = 100_000_000


@pytest.fixture
def moving(tmp_path):
    """A recording of a robot that moves before a camera that sees something else in every frame."""
    rng, messages = np.random.default_rng(0), []
    for k in range(int(SECONDS * JOINT_HZ)):
        stamp = START_NS + k * 1_000_000_000 // JOINT_HZ
        position = 0.2 * np.sin(2.0 * k / JOINT_HZ + np.arange(len(DRIVEN_JOINTS)))
        messages.append((stamp, stamp, "joints", position))
    for k in range(int(SECONDS * CAMERA_HZ)):
        stamp = START_NS + k * 1_000_000_000 // CAMERA_HZ + 3_000_000
        messages.append((stamp + CAMERA_DELAY_NS, stamp, "image", rng.integers(0, 256, (30, 40, 3), np.uint8)))
    with BagWriter(tmp_path / "moving", image_format="jpeg") as writer:
        write, log_ns = writer._writer.write, START_NS
        writer._writer.write = lambda connection, _, data: write(connection, log_ns, data)
        writer.instruction(START_NS, INSTRUCTION)
        for log_ns, stamp, kind, value in sorted(messages, key=lambda message: message[0]):
            if kind == "joints":
                writer.joints(JointState(stamp, DRIVEN_JOINTS, value))
            else:
                writer.image(stamp, "head", value.repeat(16, 0).repeat(16, 1))
    return tmp_path / "moving"


@pytest.mark.parametrize("stalls", [0, pytest.param(10, marks=pytest.mark.slow)])
def test_nodes_and_library_give_the_same_chunks(moving, bundle, start, peer, stalls):
    chunks = peer.listen(JointTrajectory, "action_chunk", qos.chunk(1.0, 10.0))
    node = start("vla_node", bundle=bundle, image_transport="compressed", rate=5.0, use_sim_time=True, seed=7)
    wait_for(lambda: peer.change("vla", 1, 3) == [True, True], 60.0, "the vla node")
    player = start("replay_node", bag=moving, clock=True)
    # What a busy machine does to a process: frames and the joints of their moments then come together.
    for _ in range(stalls):
        time.sleep(0.5)
        os.kill(node.pid, signal.SIGSTOP)
        time.sleep(0.15)
        os.kill(node.pid, signal.SIGCONT)
    assert player.wait(60.0) == 0, player.output
    wait_for(lambda: len(chunks) >= 10, 10.0, f"chunks; the node said {node.output[-400:]}")
    received = [
        ActionChunk(
            convert.stamp_of(message),
            tuple(message.joint_names),
            np.array([point.positions for point in message.points]),
            message.points[0].time_from_start.nanosec / 1e9,
        )
        for message in chunks
    ]
    # the recording's clock, not this machine's
    assert all(START_NS <= chunk.stamp_ns <= START_NS + SECONDS * 1e9 for chunk in received)
    found = compare_chunks(moving, bundle, received, seed=7, threads=1)
    assert found.chunks == len(received) and found.max_difference <= 1e-6
    assert compare_chunks(moving, bundle, received[:2], seed=8).max_difference > 1e-6
