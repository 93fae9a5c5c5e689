"""The quality of service of every topic, in one place; doc/topics.md says why."""

from __future__ import annotations

from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, HistoryPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy



def _profile(depth: int = 1, reliable: bool = True, latched: bool = False, **more) -> QoSProfile:
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
        **more,
    )


# Cameras and joints: a lost message is replaced by the next, a late one is worth nothing.
SENSOR = _profile(reliable=False)
# The same where every message counts and several are taken at a time.
STREAM = _profile(depth=100, reliable=False)
# A publisher of sensor data offers reliability, so that subscribers of both kinds hear it.
SENSOR_OUT = _profile()
# Said once and meant until said otherwise: instruction, emergency stop, speed scale, outcome.
LATCHED = _profile(latched=True)
# Who moves the robot: every change counts, also for a recorder that comes late.
EVERY_CHANGE = _profile(depth=100, latched=True)
# As rclpy subscribes to it.
CLOCK = _profile(reliable=False)
COMMAND = _profile()
DIAGNOSTICS = _profile(depth=10)
CHUNK_IN = _profile()


def chunk(period: float, horizon: float) -> QoSProfile:
    """Of action_chunk: the newest one counts, and only while a point of it lies ahead.

    Args:
        period: s between chunks; twice that without one is a missed deadline.
        horizon: s from an observation to its chunk's last point.
    """
    return _profile(deadline=Duration(seconds=2.0 * period), lifespan=Duration(seconds=horizon))


def heartbeat(period: float) -> QoSProfile:
    """Of a heartbeat: the middleware itself tells subscribers that one was missed, or that its node is gone.

    Args:
        period: s between beats; a subscriber has to ask for three or more of them.
    """
    lease = Duration(seconds=3.0 * period)
    return _profile(
        deadline=lease, liveliness=LivelinessPolicy.MANUAL_BY_TOPIC, liveliness_lease_duration=lease
    )
