"""Tells when an operator moves the robot, so that recordings know whose motion they hold."""

from __future__ import annotations

from std_msgs.msg import Header

from vla_edge.control.report import ControlReport
from vla_edge.nodes import convert, qos

OPERATOR, POLICY = "operator", "policy"


class Interventions:
    """Publishes std_msgs/Header on `intervention`: who moves the robot (`frame_id`) from when on (`stamp`).

    Args:
        node: whose topic it is.
    """

    def __init__(self, node):
        self._node = node
        self._publisher = node.create_publisher(Header, "intervention", qos.EVERY_CHANGE)
        self._begun = self._ended = 0

    def tell(self, report: ControlReport) -> None:
        """Says what has changed since the last report."""
        turns = report.counters.interventions
        if turns > self._begun:
            self._begun = turns
            self._say(OPERATOR, report.taken_over_ns)
        if self._ended < turns and report.handed_back_ns is not None:
            self._ended = turns
            self._say(POLICY, report.handed_back_ns)

    def destroy(self) -> None:
        """Takes the publisher back."""
        self._node.destroy_publisher(self._publisher)

    def _say(self, who: str, stamp_ns: int) -> None:
        self._publisher.publish(Header(stamp=convert.to_time(stamp_ns), frame_id=who))
