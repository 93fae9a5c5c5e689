"""What a node that conducts others needs: calls that wait, and messages that can be waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from std_srvs.srv import Trigger

from vla_edge.types import VlaEdgeError

ATTEMPTS = 3


class ConductError(VlaEdgeError):
    """Another node did not answer, or refused."""


class NoAnswerError(ConductError):
    """The service is there and was called, but no answer came in time."""


class Conductor:
    """Calls other nodes from plain sequential code, while a thread takes this node's messages.

    Args:
        node: its callbacks run in a thread of their own while the conductor is open; use it as a context manager.
    """

    def __init__(self, node):
        self._node = node
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._thread = threading.Thread(target=self._spin, name="messages", daemon=True)
        self._clients: dict[str, object] = {}

    def call(self, service: str, timeout: float = 5.0) -> str:
        """Calls a Trigger service; its message. Asks again when no answer comes: what is asked for may be asked twice.

        A server that has not discovered its client's reader within 100 ms drops the answer (rmw_fastrtps), which
        happens on a machine that is busy starting nodes.

        Raises:
            ConductError: no answer in time, or a refusal.
        """
        for attempt in range(ATTEMPTS):
            try:
                response = self.request(Trigger, service, Trigger.Request(), timeout)
                break
            except NoAnswerError:
                if attempt + 1 == ATTEMPTS:
                    raise
        if not response.success:
            raise ConductError(f"{service} was refused: {response.message}")
        return response.message

    def wait_active(self, name: str, timeout: float) -> None:
        """Waits until a lifecycle node is active.

        Raises:
            ConductError: it is not, in time.
        """
        deadline, label = time.monotonic() + timeout, "not there"
        while (left := deadline - time.monotonic()) > 0:
            try:
                state = self.request(GetState, f"{name}/get_state", GetState.Request(), min(left, 2.0)).current_state
            except ConductError:
                continue
            if state.id == State.PRIMARY_STATE_ACTIVE:
                return
            label = state.label
            time.sleep(0.1)
        raise ConductError(f"node {name} is {label} after {timeout:.0f} s; see its own log for the reason")

    def bring_up(self, name: str, timeout: float) -> None:
        """Configures and activates a lifecycle node.

        Raises:
            ConductError: it refuses, or does not answer.
        """
        deadline = time.monotonic() + timeout
        for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            request = ChangeState.Request()
            request.transition.id = transition
            try:
                left = deadline - time.monotonic()
                answer = self.request(ChangeState, f"{name}/change_state", request, left / 2)
            except NoAnswerError:
                continue  # the answer may be lost and the transition made: the end shows
            if not answer.success:
                raise ConductError(f"node {name} refused; see its own log for the reason")
        self.wait_active(name, max(1.0, deadline - time.monotonic()))

    @staticmethod
    def wait(condition: Callable[[], object], timeout: float):
        """The first true value of `condition`, or None after `timeout` s."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.01)
        return None

    def request(self, kind, service: str, request, timeout: float):
        """Calls any service once; its response.

        Raises:
            ConductError: the service is not there, or does not answer.
        """
        client = self._clients.get(service)
        if client is None:
            client = self._clients[service] = self._node.create_client(kind, service)
        deadline = time.monotonic() + timeout
        if not client.wait_for_service(timeout_sec=timeout):
            raise ConductError(f"service {service} is not there; is its node running?")
        done = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: done.set())
        if not done.wait(max(0.0, deadline - time.monotonic())):
            client.remove_pending_request(future)
            raise NoAnswerError(f"service {service} did not answer within {timeout:g} s")
        return future.result()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass

    def __enter__(self) -> Conductor:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)
