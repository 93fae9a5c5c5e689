"""Topics of hundreds of messages a second, taken without an executor.

For each message rclpy's executor builds a wait set of all subscriptions, services, timers and guards of the node anew:
one to two milliseconds of Python, most of a core at 500 Hz. A subscription that belongs to no executor is taken from
directly: when the owner has a moment anyway (`drain`), or by a thread that waits for nothing else (`StreamThread`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import rclpy
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.qos import QoSProfile

from vla_edge.control.realtime import prioritize


class Stream:
    """One subscription outside any executor.

    Args:
        owner: its name, namespace and remappings apply.
        kind, topic, qos: as for `create_subscription`.
        callback: takes the message and its info, a dictionary with `received_timestamp` in ns.
        raw: give serialized bytes.
    """

    def __init__(
        self, owner, kind: type, topic: str, callback: Callable[[object, dict], None], qos: QoSProfile, raw: bool = False
    ):
        # A node no executor knows, so that none takes the messages away.
        self._node = rclpy.create_node(
            f"{owner.get_name()}_{topic.strip('~/').replace('/', '_')}", context=owner.context,
            namespace=owner.get_namespace(), use_global_arguments=False, start_parameter_services=False,
            enable_rosout=False,
        )
        resolved = owner.resolve_topic_name(topic)
        self.subscription = self._node.create_subscription(kind, resolved, lambda message: None, qos, raw=raw)
        self._callback = callback
        self._newest_only = qos.depth == 1
        self._taking = threading.Lock()

    def drain(self) -> int:
        """Hands what has arrived to the callback, in order whichever threads drain; how many messages that were."""
        subscription, count = self.subscription, 0
        with self._taking, subscription.handle:
            while (taken := subscription.handle.take_message(subscription.msg_type, subscription.raw)) is not None:
                self._callback(*taken)
                count += 1
                if self._newest_only:
                    break
        return count

    def destroy(self) -> None:
        """Leaves the network. Whatever drains it must have ended."""
        self._node.destroy_subscription(self.subscription)
        self._node.destroy_node()


class StreamThread:
    """Waits for streams and drains them, in a thread of its own.

    Args:
        streams: drained as soon as one has a message.
        rest: s to sleep after each round; what comes meanwhile is taken together, at the cost of its age.
        priority: of SCHED_FIFO for the thread, where it is granted; 0 for none.
    """

    def __init__(self, streams: Sequence[Stream], rest: float = 0.0, name: str = "streams", priority: int = 0):
        self._streams, self._rest, self._priority = list(streams), rest, priority
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and its streams."""
        self._end.set()
        self._thread.join(2.0)
        for stream in self._streams:
            stream.destroy()

    def _run(self) -> None:
        prioritize(self._priority, [0])
        context = self._streams[0]._node.context
        wait_set = rclpy_implementation.WaitSet(len(self._streams), 0, 0, 0, 0, 0, context.handle)
        while not self._end.is_set() and context.ok():
            wait_set.clear_entities()
            for stream in self._streams:
                wait_set.add_subscription(stream.subscription.handle)
            # Not without end: a wait set does not notice that the thread is told to end.
            wait_set.wait(100_000_000)
            for stream in self._streams:
                stream.drain()
            if self._rest:
                time.sleep(self._rest)
