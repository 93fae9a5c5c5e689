"""A policy on another computer: the controller and its robot before a network that delays, reorders and loses.

The robot's side is near_side.py, which pytest runs inside a network namespace; the source of chunks runs in another.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# Shared memory would reach from one namespace into the other, as if there were no network.
ONLY_UDP = """<?xml version="1.0" encoding="UTF-8" ?>
<profiles xmlns="http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles">
  <transport_descriptors>
    <transport_descriptor><transport_id>udp</transport_id><type>UDPv4</type></transport_descriptor>
  </transport_descriptors>
  <participant profile_name="udp" is_default_profile="true">
    <rtps>
      <userTransports><transport_id>udp</transport_id></userTransports>
      <useBuiltinTransports>false</useBuiltinTransports>
    </rtps>
  </participant>
</profiles>
"""


@pytest.fixture
def network(tmp_path):
    """(namespace of the robot, namespace of the policy, knobs of what lies between)."""
    if os.geteuid() or not shutil.which("ip") or not os.path.exists("/dev/net/tun"):
        pytest.skip("needs root, the program `ip` and /dev/net/tun to make network namespaces")
    near, far, knobs = f"vla_near_{os.getpid()}", f"vla_far_{os.getpid()}", tmp_path / "knobs.json"
    knobs.write_text("{}")
    carrier = subprocess.Popen(
        [sys.executable, str(HERE / "bad_network.py"), near, far, str(knobs)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )
    said = carrier.stdout.readline()
    if said != "ready\n":
        carrier.wait()
        pytest.skip(f"network namespaces are not granted here: {said}{carrier.stdout.read()}")
    yield near, far, knobs
    carrier.terminate()
    carrier.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_robot_whose_policy_is_behind_a_bad_network_stays_within_limits_holds_and_goes_on(network, tmp_path):
    near, far, knobs = network
    profile = tmp_path / "only_udp.xml"
    profile.write_text(ONLY_UDP)
    environment = {
        **os.environ, "VLA_EDGE_FAR": far, "VLA_EDGE_KNOBS": str(knobs), "FASTRTPS_DEFAULT_PROFILES_FILE": str(profile),
        "FASTDDS_DEFAULT_PROFILES_FILE": str(profile), "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET",
    }
    if environment.get("ROS_DISTRO") == "humble":
        environment["ROS_LOCALHOST_ONLY"] = "0"
    done = subprocess.run(
        ["ip", "netns", "exec", near, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(HERE / "near_side.py")], cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=380,
    )
    assert done.returncode == 0 and " passed" in done.stdout, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
