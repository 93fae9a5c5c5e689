"""A ROS domain of its own for the session, a namespace for each test, and an engine to serve."""

from __future__ import annotations

import os
import sys
import zlib

import pytest

# Before the first import of rclpy: wheels keep the middleware in the environment itself.
os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
os.environ["ROS_DOMAIN_ID"] = str(50 + os.getpid() % 50)
if os.environ.get("ROS_DISTRO") == "humble":
    os.environ.setdefault("ROS_LOCALHOST_ONLY", "1")
else:
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")


@pytest.fixture(scope="session", autouse=True)
def ros():
    import rclpy

    from vla_edge.nodes import middleware

    middleware.prepare()
    rclpy.init()
    yield
    rclpy.try_shutdown()


@pytest.fixture
def namespace(request) -> str:
    # The sum keeps names apart whose difference lies beyond the cut: what a killed controller leaves behind talks on.
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)[:50].strip("_")
    return f"/t_{name}_{zlib.crc32(request.node.name.encode()):08x}"


@pytest.fixture
def peer(namespace):
    from live import Peer

    with Peer(namespace) as peer:
        yield peer


@pytest.fixture
def start(namespace, tmp_path):
    """Starts a node; whatever still runs at the end of the test is killed."""
    from live import NodeProcess

    started = []

    def start(executable: str, **parameters) -> NodeProcess:
        process = NodeProcess(executable, namespace, tmp_path / f"{executable}_{len(started)}.log", **parameters)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.running:
            process.kill()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Directory of the tiny checkpoint."""
    from g1_engine import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("g1") / "checkpoint")


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory):
    """Directory of an engine of the tiny checkpoint."""
    from g1_engine import observations

    from vla_edge.engine.build import build

    output = tmp_path_factory.mktemp("bundles") / "fp32"
    return build(checkpoint, "fp32", "onnxruntime", output, calibration=observations(24))
