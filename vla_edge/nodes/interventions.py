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
        self._told: tuple[int | None, int | None] = (None, None)

    def tell(self, report: ControlReport) -> None:
        """Says what has changed since the last report."""
        seen = (report.taken_over_ns, report.handed_back_ns)
        if seen[0] is not None and seen[0] != self._told[0]:
            self._say(OPERATOR, seen[0])
        if seen[1] is not None and seen != self._told:
            self._say(POLICY, seen[1])
        self._told = seen

    def destroy(self) -> None:
        """Takes the publisher back."""
        self._node.destroy_publisher(self._publisher)

    def _say(self, who: str, stamp_ns: int) -> None:
        self._publisher.publish(Header(stamp=convert.to_time(stamp_ns), frame_id=who))
