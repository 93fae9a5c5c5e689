"""The controller's outlet: runs inside the real-time process, and publishes each command as it is computed."""

from __future__ import annotations

import time

from vla_edge.control.modes import Mode
from vla_edge.types import JointCommand


class CommandPublisher:
    """Publishes joint commands; called by the controller's loop.

    Args:
        topic: fully resolved.
        sink: key of `sinks.SINKS`.
        setup: what the sink is made for.
        namespace: of the node it makes; it is named after its owner.
        owner: name of the controller's node.
    """

    def __init__(self, topic: str, sink: str, setup, namespace: str, owner: str):
        import rclpy
        from rclpy.signals import SignalHandlerOptions

        from vla_edge.nodes import middleware, qos
        from vla_edge.nodes.sinks import SINKS

        middleware.prepare(images=False)
        self._rclpy = rclpy
        self._context = rclpy.Context()
        # No arguments of the command line: topics come resolved, and a node's remapping must not apply twice.
        rclpy.init(args=[], context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node(
            f"{owner}_command", namespace=namespace, context=self._context, enable_rosout=False,
            start_parameter_services=False, use_global_arguments=False,
        )
        self._period = setup.period
        self._fill = SINKS[sink](setup, self._node)
        self._publisher = self._node.create_publisher(self._fill.message_type(), topic, qos.COMMAND)
        self._others = [
            (self._node.create_publisher(kind, name, qos.COMMAND), fill)
            for name, kind, fill in getattr(self._fill, "others", ())
        ]
        self._spoke = False

    def __call__(self, command: JointCommand, mode: Mode) -> None:
        self._spoke = True
        self._publisher.publish(self._fill(command, mode))
        for publisher, fill in self._others:
            publisher.publish(fill(command, mode))

    def listened(self) -> bool:
        """Whether the robot's driver, or anyone else, has subscribed."""
        return self._publisher.get_subscription_count() > 0

    def close(self) -> None:
        """Says what ends a sink, if it has begun, and leaves the network."""
        if self._spoke and hasattr(self._fill, "farewell"):
            for message in self._fill.farewell():
                self._publisher.publish(message)
                time.sleep(self._period)
        self._node.destroy_node()
        self._rclpy.shutdown(context=self._context)
