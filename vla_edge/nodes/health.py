"""What a node says about itself: one DiagnosticArray, on its own status topic and on /diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from vla_edge.nodes import qos
from vla_edge.serve.latency import LatencySummary


class Level(Enum):
    """Severity, as rqt's robot monitor colours it."""

    OK = DiagnosticStatus.OK
    WARN = DiagnosticStatus.WARN
    ERROR = DiagnosticStatus.ERROR
    STALE = DiagnosticStatus.STALE


class Health:
    """Publishes a node's state.

    Args:
        node: whose it is.
        hardware_id: robot or engine, for the operator.
    """

    def __init__(self, node, hardware_id: str = ""):
        self._node, self._hardware_id = node, hardware_id
        self._publishers = [
            node.create_publisher(DiagnosticArray, topic, qos.DIAGNOSTICS) for topic in ("~/status", "/diagnostics")
        ]

    def publish(self, level: Level, message: str, values: Mapping[str, object]) -> None:
        """Says it now. Numbers are written so that they read back; what is not known is an empty string."""
        status = DiagnosticStatus(
            level=level.value,
            name=self._node.get_fully_qualified_name().lstrip("/"),
            message=message,
            hardware_id=self._hardware_id,
            values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
        )
        array = DiagnosticArray(status=[status])
        array.header.stamp = self._node.get_clock().now().to_msg()
        for publisher in self._publishers:
            publisher.publish(array)

    def destroy(self) -> None:
        """Takes the publishers back."""
        for publisher in self._publishers:
            self._node.destroy_publisher(publisher)


def latency_values(name: str, summary: LatencySummary) -> dict[str, float]:
    """`<name>_ms.p50` and so on, of a summary in s."""
    return {
        f"{name}_ms.{key}": 1e3 * getattr(summary, field)
        for key, field in (("p50", "p50"), ("p95", "p95"), ("p99", "p99"), ("max", "maximum"))
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return str(value)
