"""How every node of this package is run: one executor, a clean end on SIGINT and SIGTERM, an exit code that tells."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions

from vla_edge.nodes import middleware
from vla_edge.types import VlaEdgeError


def run_node(make: Callable[[], object], args=None, images: bool = True) -> None:
    """Spins the node that `make` returns until it is told to end; then calls its `close()` if it has one.

    A VlaEdgeError ends the process with code 1 and one sentence on stderr. A node may set `exit_code`, and end itself
    by shutting rclpy down. `images` as for `middleware.prepare`.
    """
    middleware.prepare(images)
    # Our own handlers: rclpy's would shut the context down before a node could say its last words, and an exception
    # raised out of a handler may strike in the middle of a message's conversion.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    told_to_end: list[int] = []
    _handle_signals(lambda number, frame: told_to_end.append(number))
    node, code = None, 0
    try:
        node = make()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while rclpy.ok() and not told_to_end:
            # A wait without end would not see a signal until the next message.
            executor.spin_once(timeout_sec=0.2)
    except ExternalShutdownException:
        pass
    except VlaEdgeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    finally:
        # A second Ctrl-C must not interrupt what is being put in order.
        _handle_signals(signal.SIG_IGN)
        if node is not None:
            if hasattr(node, "close"):
                node.close()
            code = code or getattr(node, "exit_code", 0)
            node.destroy_node()
        if rclpy.ok():
            rclpy.shutdown()
    sys.exit(code)


def run_once(name: str, work: Callable[[object], int], args=None) -> None:
    """Gives `work` a node called `name` for its parameters and topics, and ends with the code it returns."""
    middleware.prepare()
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    _handle_signals(_interrupt)
    node = rclpy.create_node(name)
    try:
        code = work(node)
    except VlaEdgeError as error:
        node.get_logger().error(f"{type(error).__name__}: {error}")
        code = 1
    except KeyboardInterrupt:
        code = 130
    finally:
        node.destroy_node()
        rclpy.shutdown()
    sys.exit(code)


def nice(level: int) -> bool:
    """Sets how far this process stands back behind others, for every thread it has or makes; False where refused."""
    try:
        for thread in os.listdir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), level)
    except OSError:
        return False
    return True


def _handle_signals(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(number, frame):
    raise KeyboardInterrupt
