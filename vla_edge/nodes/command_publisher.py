"""The controller's outlet: runs inside the real-time process, and publishes each command as it is computed."""

from __future__ import annotations

from vla_edge.control.modes import Mode
from vla_edge.types import JointCommand


class CommandPublisher:
    """Publishes joint commands; called by the controller's loop.

    Args:
        topic: fully resolved.
        sink: key of `sinks.SINKS`.
        names: joints of the commands.
        period: s between commands.
        namespace: of the node it makes; it is named after its owner.
        owner: name of the controller's node.
    """

    def __init__(self, topic: str, sink: str, names: tuple[str, ...], period: float, namespace: str, owner: str):
        import rclpy
        from rclpy.signals import SignalHandlerOptions

        from vla_edge.nodes import middleware, qos
        from vla_edge.nodes.sinks import SINKS

        middleware.prepare()
        self._rclpy = rclpy
        self._context = rclpy.Context()
        # No arguments of the command line: topics come resolved, and a node's remapping must not apply twice.
        rclpy.init(args=[], context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node(
            f"{owner}_command", namespace=namespace, context=self._context, enable_rosout=False,
            start_parameter_services=False, use_global_arguments=False,
        )
        self._fill = SINKS[sink](names, period)
        self._publisher = self._node.create_publisher(SINKS[sink].type, topic, qos.COMMAND)

    def __call__(self, command: JointCommand, mode: Mode) -> None:
        self._publisher.publish(self._fill(command))

    def close(self) -> None:
        """Leaves the network."""
        self._node.destroy_node()
        self._rclpy.shutdown(context=self._context)
