"""ROS for tests inside this process: a domain of their own, nothing beyond this machine."""

from __future__ import annotations

import os
import sys

import pytest

# Before the first import of rclpy: wheels keep the middleware in the environment itself.
os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
os.environ["ROS_DOMAIN_ID"] = str(50 + os.getpid() % 50)
if os.environ.get("ROS_DISTRO") == "humble":
    os.environ.setdefault("ROS_LOCALHOST_ONLY", "1")
else:
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")


@pytest.fixture
def make_node():
    """Makes nodes with parameter overrides, and takes them down."""
    import rclpy
    from rclpy.parameter import Parameter

    # A context of its own: the tests of whole nodes keep the default one until the session ends.
    context = rclpy.Context()
    rclpy.init(context=context)
    made = []

    def make(**overrides):
        node = rclpy.create_node(
            "tested",
            context=context,
            parameter_overrides=[Parameter(key, value=value) for key, value in overrides.items()],
        )
        made.append(node)
        return node

    yield make
    for node in made:
        node.destroy_node()
    rclpy.shutdown(context=context)
