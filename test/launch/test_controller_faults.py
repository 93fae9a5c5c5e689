"""What fails around the controller, with real processes: it stays within limits, holds, and goes on where it may."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from live import SOURCE, wait_for
from sensor_msgs.msg import JointState
from std_msgs.msg import Header
from test_controller_node import Arms

from vla_edge.nodes import qos
from vla_edge.robots.g1 import DRIVEN_JOINTS


@pytest.fixture
def arms(start, peer):
    # Starting a source takes the processors; that must not look like a robot that fell silent.
    arms = Arms(start, peer, joint_state_timeout=5.0)
    yield arms
    arms.robot.close()


@pytest.fixture
def source(namespace):
    """Starts a process that publishes chunks."""
    started = []

    def start() -> subprocess.Popen:
        path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
        script = str(Path(__file__).with_name("chunk_source.py"))
        started.append(subprocess.Popen([sys.executable, script, namespace], env={**os.environ, "PYTHONPATH": path}))
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
    assert arms.keeps_to_velocities()


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
