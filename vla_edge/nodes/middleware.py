"""Prepares a process for large messages, or for punctual ones, before its first ROS call; every node here does."""

from __future__ import annotations

import ctypes
import os

from vla_edge.resources import share_directory

PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
TRANSPORTS = "FASTDDS_BUILTIN_TRANSPORTS"
DISCOVERY, LOCALHOST, PEERS = "ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS"
CHANGED = (PROFILE_VARIABLES[0], TRANSPORTS, DISCOVERY, LOCALHOST)
_BEFORE = "VLA_EDGE_BEFORE_"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare(images: bool = True) -> None:
    """Room for images in shared memory, or for punctual messages none of it; memory that is kept once it was touched.

    When another process joins the network, Fast DDS waits for up to a third of a second until that one's shared memory
    is known to be healthy, and whatever is published meanwhile waits with it: ticks of a controller came 311 ms late while
    a busy process made a node, and 3 ms over UDP (measured, Fast DDS 2.14). So processes without images use UDP. With
    LOCALHOST the ROS 2 layer would add shared memory whatever it is told; these processes then are given UDP on the
    loopback interface instead. What the user has set for Fast DDS stays.

    glibc returns every freed image to the kernel, which then clears its 225 pages anew for the next one: 1.6 ms for
    each copy of a raw 640x480 image, against 0.15 ms when the pages are kept (measured, test machine).

    Args:
        images: whether the process sends or takes images.
    """
    _forget_parent()
    if not any(os.environ.get(name) for name in (*PROFILE_VARIABLES, TRANSPORTS)):
        _choose_transports(images)
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 29)
    except (OSError, AttributeError):
        pass  # not glibc: then only slower


def _choose_transports(images: bool) -> None:
    from rclpy.utilities import get_rmw_implementation_identifier

    if "fastrtps" not in get_rmw_implementation_identifier():
        return
    config = share_directory() / "config"
    if images:
        _set(PROFILE_VARIABLES[0], str(config / "fastdds.xml"))
    elif (os.environ.get(DISCOVERY) == "LOCALHOST" or os.environ.get(LOCALHOST) == "1") and not os.environ.get(PEERS):
        _set(PROFILE_VARIABLES[0], str(config / "fastdds_loopback.xml"))
        _set(DISCOVERY, "SUBNET")  # as far as the profile lets it: no further than the loopback interface
        _set(LOCALHOST, "")
    else:
        _set(TRANSPORTS, "UDPv4")


def _set(name: str, value: str) -> None:
    """Sets a variable, or removes it where the value is empty."""
    os.environ[_BEFORE + name] = os.environ.pop(name, "")
    if value:
        os.environ[name] = value


def _forget_parent() -> None:
    """A process started by one of this package inherits what was set for that one."""
    for name in CHANGED:
        before = os.environ.pop(_BEFORE + name, None)
        if before is not None:
            os.environ.pop(name, None)
        if before:
            os.environ[name] = before
