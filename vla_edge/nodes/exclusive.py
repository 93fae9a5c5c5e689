"""One controller for one robot: a lock on this machine, and an ear for who commands it from another."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from pathlib import Path

from vla_edge.nodes import qos
from vla_edge.nodes.stream import Stream
from vla_edge.types import VlaEdgeError

PATIENCE_S = 4.0
"""s to wait for a controller that is just ending, such as one whose node was killed."""
LISTEN_S, DISCOVERY_S = 0.3, 1.0
"""s of silence on the command topic that mean nobody else commands, and s for a new node to find out who is there."""


class SecondControllerError(VlaEdgeError):
    """The robot has a controller already."""


def claim(topic: str, patience: float = PATIENCE_S) -> int:
    """A file descriptor that holds the command topic of this ROS domain for whoever keeps it open.

    Raises:
        SecondControllerError: another process on this machine holds it.
    """
    domain = os.environ.get("ROS_DOMAIN_ID") or "0"
    name = hashlib.sha256(f"{domain}:{topic}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"vla_edge_controller_{name}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise SecondControllerError(
                    f"another controller on this machine commands {topic} in ROS domain {domain}; end it first, or give "
                    "this one a topic of its own"
                ) from None
            time.sleep(0.05)


def refuse_second(node, kind: type, topic: str, born_ns: int) -> None:
    """Listen on the command topic for a moment.

    Args:
        node: has been on the network since `born_ns` of the steady clock.
        topic: resolved.

    Raises:
        SecondControllerError: somebody speaks on it.
    """
    heard: list[bytes] = []
    stream = Stream(node, kind, topic, lambda message, info: heard.append(message), qos.SENSOR, raw=True)
    deadline = max(time.monotonic() + LISTEN_S, born_ns * 1e-9 + DISCOVERY_S)
    while not heard and time.monotonic() < deadline:
        stream.drain()
        time.sleep(0.01)
    stream.destroy()
    if heard:
        names = sorted(
            f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in node.get_publishers_info_by_topic(topic)
        )
        raise SecondControllerError(
            f"{topic} is being commanded already, by {', '.join(names) or 'an unnamed publisher'}; two at once make a "
            "robot shake. End it first (on a Unitree, release its motion service before lowcmd)"
        )
