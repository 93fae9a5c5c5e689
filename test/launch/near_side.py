"""What test_network_faults.py runs on the robot's side of a bad network; not a test by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from live import SOURCE
from test_controller_node import Arms

FAR, KNOBS = os.environ["VLA_EDGE_FAR"], Path(os.environ["VLA_EDGE_KNOBS"])


def between(**how: float) -> None:
    """Sets what the network does from now on."""
    partial = KNOBS.with_suffix(".partial")
    partial.write_text(json.dumps(how))
    partial.replace(KNOBS)


@pytest.fixture
def arms(start, peer, namespace):
    """A controller on this side, armed; chunks from the other."""
    arms = Arms(start, peer, joint_state_timeout=5.0)
    arms.arm()
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    source = subprocess.Popen(
        ["ip", "netns", "exec", FAR, sys.executable, str(Path(__file__).with_name("chunk_source.py")), namespace],
        env={**os.environ, "PYTHONPATH": path},
    )
    peer.diagnostics("controller", lambda values: values["mode"] == "FOLLOW", 40.0)
    yield arms
    source.kill()
    source.wait()
    arms.robot.close()


def test_delay_disorder_and_loss_cost_chunks_and_nothing_else(arms):
    between(delay=0.15, jitter=0.2, loss=0.15)
    accepted = int(arms.peer.diagnostics("controller")["chunks.accepted"])
    time.sleep(8.0)
    values = arms.says(mode="FOLLOW")
    # Ten a second without the network's doing.
    assert accepted + 8 < int(values["chunks.accepted"]) and values["faults"] == "0"
    assert arms.keeps_to_velocities() and arms.keeps_to_accelerations()
    between()


def test_a_network_that_is_gone_ends_in_hold_which_is_left_by_itself_when_it_is_back(arms):
    between(loss=1.0)
    gone = time.monotonic()
    arms.says(mode="HOLD")
    # The last chunk's 1.6 s, 0.1 s until HOLD, and the patience of a status every 0.1 s on a loaded machine.
    assert time.monotonic() - gone < 1.6 + 0.1 + 2.0
    time.sleep(1.0)  # until it has braked
    stands = len(arms.commands)
    time.sleep(0.5)
    still = np.array([message.position for _, message in arms.commands[stands:]])
    assert len(still) > 5 and np.ptp(still, axis=0).max() < 1e-6
    between(delay=0.02)
    values = arms.peer.diagnostics("controller", lambda values: values["mode"] == "FOLLOW", 30.0)
    assert values["faults"] == "0"
    assert arms.keeps_to_velocities() and arms.keeps_to_accelerations()
