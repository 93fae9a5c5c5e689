"""A beat by which others see that a node lives and does its work: std_msgs/Header, its frame_id saying what it does."""

from __future__ import annotations

from collections.abc import Callable

from std_msgs.msg import Header

from vla_edge.nodes import qos


class Heartbeat:
    """Beats on `~/heartbeat` until it is destroyed; the middleware tells subscribers when it stops.

    Args:
        node: whose it is.
        period: s between beats.
        state: what the node does; None when it hangs, and no beat is given.
    """

    def __init__(self, node, period: float, state: Callable[[], str | None]):
        self._node, self._state = node, state
        self._publisher = node.create_publisher(Header, "~/heartbeat", qos.heartbeat(period))
        self._timer = node.create_timer(period, self._beat)

    def destroy(self) -> None:
        """Ends it."""
        self._node.destroy_timer(self._timer)
        self._node.destroy_publisher(self._publisher)

    def _beat(self) -> None:
        state = self._state()
        if state is not None:
            self._publisher.publish(Header(stamp=self._node.get_clock().now().to_msg(), frame_id=state))
