"""What processes are given to talk over: asked of a participant that was made."""

import os
import shutil
import subprocess
import sys

import pytest

from vla_edge.resources import share_directory

SHOW = """
import glob, os, sys
from vla_edge.nodes import middleware
for images in sys.argv[1:]:
    middleware.prepare(images=images == "images")
import rclpy
rclpy.init()
node = rclpy.create_node("shown")
if "fastrtps" not in rclpy.utilities.get_rmw_implementation_identifier():
    sys.exit(77)
threads = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
mapped = any("/dev/shm/fastrtps" in line for line in open("/proc/self/maps"))
listening = any(name.startswith("dds.shm") for name in threads)
loopback = "127.0.0.1" in open(os.environ.get(middleware.PROFILE_VARIABLES[0], os.devnull)).read()
print("memory" if mapped or listening else "udp", "loopback" if loopback else "-")
print(os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE"), os.environ.get("ROS_LOCALHOST_ONLY"))
"""


def show(*prepared, script=SHOW, **environment) -> list[str]:
    """What a process says that prepares itself so, one word after the other."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("FASTRTPS", "FASTDDS", "VLA_EDGE"))}
    for name in ("ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_LOCALHOST_ONLY"):
        keep.pop(name, None)
    command = [sys.executable, "-c", script, *prepared]
    done = subprocess.run(command, capture_output=True, text=True, env=keep | environment)
    if done.returncode == 77:
        pytest.skip("not Fast DDS")
    assert not done.returncode, done.stderr
    return done.stdout.split()


LOCAL = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}


@pytest.mark.parametrize("older", [False, True])
def test_images_go_through_shared_memory_and_small_messages_never(older):
    local = {"ROS_LOCALHOST_ONLY": "1"} if older else LOCAL
    assert show("images", **local)[:2] == ["memory", "-"]
    assert show("small", **local) == ["udp", "loopback", "SUBNET", "None"]


def test_what_was_set_for_a_parent_does_not_reach_the_child():
    assert show("small", "images", **LOCAL) == ["memory", "-", "LOCALHOST", "None"]
    assert show("images", "small", **LOCAL) == ["udp", "loopback", "SUBNET", "None"]


def test_what_the_user_has_set_stays(tmp_path):
    own = shutil.copy(share_directory() / "config" / "fastdds.xml", tmp_path / "own.xml")
    said = show("small", FASTRTPS_DEFAULT_PROFILES_FILE=str(own), **LOCAL)
    assert said == ["memory", "-", "LOCALHOST", "None"]
    assert show("small", ROS_STATIC_PEERS="127.0.0.1", **LOCAL)[2] == "LOCALHOST"


def test_on_a_network_small_messages_keep_to_udp_too():
    ask = """
import os
from vla_edge.nodes import middleware
middleware.prepare(images=False)
print(os.environ.get("FASTDDS_BUILTIN_TRANSPORTS"), os.environ.get("FASTRTPS_DEFAULT_PROFILES_FILE"))
"""
    # no participant is made here: it would talk to the network
    assert show(script=ask) in (["UDPv4", "None"], ["None", "None"])
