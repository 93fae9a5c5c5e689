"""What fails around the controller, with real processes: it stays within limits, holds, and goes on where it may."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from live import SOURCE, wait_for
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import Header
from test_controller_node import Arms

from vla_edge.nodes import convert, qos
from vla_edge.robots.g1 import DRIVEN_JOINTS


@pytest.fixture
def arms(start, peer):
    # Starting a source takes the processors; that must not look like a robot that fell silent.
    arms = Arms(start, peer, joint_state_timeout=5.0)
    yield arms
    arms.robot.close()


@pytest.fixture
def source(namespace):
    """Starts a process that publishes chunks, see chunk_source.py."""
    started = []

    def start(*how: str) -> subprocess.Popen:
        path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
        script = [sys.executable, str(Path(__file__).with_name("chunk_source.py")), namespace, *how]
        started.append(subprocess.Popen(script, env={**os.environ, "PYTHONPATH": path}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_source_of_chunks_that_is_killed_ends_in_hold_and_a_new_one_is_followed_by_itself(arms, source):
    arms.arm()
    victim = source()
    arms.says(mode="FOLLOW")
    time.sleep(0.5)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    killed = time.monotonic()
    arms.says(mode="HOLD")
    # The last chunk's 1.6 s, 0.1 s until HOLD, and the patience of a status every 0.1 s on a loaded machine.
    assert time.monotonic() - killed < 1.6 + 0.1 + 2.0
    still = [message.position for _, message in arms.commands[-20:]]
    time.sleep(0.5)
    assert np.abs(np.diff(np.array(still), axis=0)).max() < 0.01
    source()
    arms.says(mode="FOLLOW")
    assert arms.keeps_to_velocities() and arms.keeps_to_accelerations()


def test_chunks_that_come_late_and_out_of_order_are_followed_by_their_stamps_and_none_backwards(arms, source):
    arms.arm()
    source("0.3", "shuffle")
    arms.says(mode="FOLLOW")
    begin = len(arms.commands)
    values = arms.peer.diagnostics("controller", lambda v: int(v["rejected.chunk.order"]) >= 5, 30.0)
    # The overtaken ones are refused, the others followed; all that time there is one to follow.
    assert int(values["chunks.accepted"]) >= 5 and values["faults"] == "0" and values["holds"] == "0"
    moved = np.array([message.position for _, message in arms.commands[begin:]])
    assert np.ptp(moved, axis=0).max() > 0.1
    assert arms.keeps_to_velocities() and arms.keeps_to_accelerations()


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_jump_of_the_clock_neither_moves_the_robot_nor_stops_it(start, peer, namespace, jump):
    ahead = [0.0]

    def now_ns() -> int:
        return time.time_ns() + round(ahead[0] * 1e9)

    clock, end = peer.node.create_publisher(Clock, f"{namespace}/clock", qos.CLOCK), threading.Event()

    def tell() -> None:
        while not end.wait(0.005):
            clock.publish(Clock(clock=convert.to_time(now_ns())))

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    # On a loaded machine the node's own clock, told by messages, lags behind the stamps.
    patience = {"joint_state_timeout": 5.0, "future_tolerance": 1.0}
    arms = Arms(start, peer, use_sim_time="true", **patience, **{"/clock": f"{namespace}/clock"})
    try:
        arms.robot.clock = now_ns
        arms.arm()
        for target in (0.2, 0.0):
            accepted = int(arms.peer.diagnostics("controller")["chunks.accepted"])
            wait_for(lambda: abs(convert.stamp_of(arms.commands[-1][1]) - now_ns()) < 5e8, 10.0, "stamps of this clock")
            arms.send(np.full(len(DRIVEN_JOINTS), target), stamp_ns=now_ns())
            peer.diagnostics("controller", lambda v, n=accepted: int(v["chunks.accepted"]) == n + 1)
            ahead[0] += jump
            # In the middle of the chunk: it is carried out to its end all the same.
            wait_for(lambda t=target: abs(arms.robot.positions - t).max() < 0.01, 10.0, "the chunk's end")
        assert arms.peer.diagnostics("controller")["faults"] == "0"
        steps = np.abs(np.diff([message.position for _, message in arms.commands], axis=0))
        assert steps.max() < 0.05
    finally:
        end.set()
        teller.join()
        arms.robot.close()


@pytest.mark.parametrize(("seconds", "counted"), [(0.15, "late"), (1.3, "gaps")])
def test_a_controller_that_is_kept_from_running_goes_on_without_a_jump(arms, source, seconds, counted):
    arms.arm()
    source()
    arms.says(mode="FOLLOW")
    (child,) = open(f"/proc/{arms.process.pid}/task/{arms.process.pid}/children").read().split()
    os.kill(int(child), signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(int(child), signal.SIGCONT)
    values = arms.peer.diagnostics("controller", lambda v: int(v[counted]) > 0)
    assert int(values["faults"]) == 0
    # Chunks go on, and so does it.
    arms.says(mode="FOLLOW")
    assert arms.keeps_to_velocities()


def test_an_operator_takes_over_by_topic_hands_back_and_both_are_stamped(arms, source):
    told = arms.peer.listen(Header, "intervention", qos.EVERY_CHANGE)
    hand = arms.peer.node.create_publisher(JointState, "operator_command", qos.SENSOR_OUT)
    arms.arm()
    source()
    arms.says(mode="FOLLOW")
    where, name, began = np.array(arms.commands[-1][1].position), DRIVEN_JOINTS[0], time.time()
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        hand.publish(JointState(name=[name], position=[where[0] + 0.1]))
        time.sleep(0.02)
    assert arms.says(mode="OPERATOR")["interventions"] == "1" or told
    assert arms.commands[-1][1].position[0] == pytest.approx(where[0] + 0.1, abs=0.02)
    wait_for(lambda: told and told[-1].frame_id == "policy", 10.0, "the hand-back")
    # A loaded machine may have made the operator fall silent in between; turns alternate all the same.
    assert [header.frame_id for header in told] == ["operator", "policy"] * (len(told) // 2)
    stamps = [header.stamp.sec + 1e-9 * header.stamp.nanosec for header in told]
    assert began - 0.5 < stamps[0] and (np.diff(stamps) > 0).all() and stamps[-1] < time.time()
    arms.says(mode="FOLLOW")
    assert arms.keeps_to_velocities()
    hand.publish(JointState(name=["tail_joint"], position=[0.0]))
    assert "tail_joint" in arms.peer.diagnostics("controller", lambda v: "tail" in v["last_problem"])["last_problem"]
