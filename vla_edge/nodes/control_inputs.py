"""The subscriptions and services of a controller: what arrives is checked, counted when refused, and handed over."""

from __future__ import annotations

import time

import numpy as np
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_edge.control.kernel import ControlError
from vla_edge.control.process import ControllerProcess, ControlProcessError
from vla_edge.nodes import convert, qos
from vla_edge.nodes.stream import Stream, StreamThread
from vla_edge.nodes.wire import JointStates
from vla_edge.observe.joints import JointStateReader
from vla_edge.types import VlaEdgeError

_ARM_WITHIN_NS = 5_000_000_000
# service -> what the controller is asked for
ORDERS = {"hold": "hold", "stop": "hold", "start": "resume", "rearm": "rearm", "damp": "damp"}


class ControlInputs:
    """Feeds a controller from topics and services.

    Args:
        node: subscribes and serves.
        process: the controller.
        priority: of the thread that takes joint states in, see `control.realtime.prioritize`.

    Attributes:
        bad_joint_states, bad_chunks, bad_operator: messages refused before they reached the controller.
        last_problem: newest reason, for the diagnostics.
    """

    def __init__(self, node, process: ControllerProcess, priority: int = 0):
        self._node, self._process = node, process
        self._parse_joints = JointStates()
        self._read_joints = JointStateReader(process.joint_names)
        self.bad_joint_states = self.bad_chunks = self.bad_operator = 0
        self.last_problem = ""
        self._arming, self._give_up_ns, self._stopped = False, 0, False
        make, serve = node.create_subscription, node.create_service
        self._subscriptions = [
            make(JointTrajectory, "action_chunk", self._on_chunk, qos.CHUNK_IN),
            make(Bool, "emergency_stop", self._on_emergency_stop, qos.LATCHED),
            make(Float64, "speed_scale", self._on_speed_scale, qos.LATCHED),
            make(JointState, "operator_command", self._on_operator, qos.SENSOR),
        ]
        joints = Stream(node, JointState, "joint_states", self._on_joints, qos.SENSOR, raw=True)
        self._joints = StreamThread([joints], 0.0, "joint_states", priority)
        self._services = [
            serve(Trigger, f"~/{name}", lambda request, response, order=order: self._answer(order, response))
            for name, order in ORDERS.items()
        ]

    def arm_by_itself(self, wanted: bool) -> None:
        """Arm at a joint state once somebody listens to the commands, or no longer.

        Refusals are met by further attempts for a moment: the first joint states may have waited for a busy machine. An
        emergency stop, and an order to hold or to damp, ends it.
        """
        self._arming, self._give_up_ns = wanted, 0

    def destroy(self) -> None:
        """Ends subscriptions and services."""
        self._joints.close()
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        for service in self._services:
            self._node.destroy_service(service)

    def _on_joints(self, data: bytes, info) -> None:
        try:
            state = self._read_joints(*self._parse_joints(data))
        except VlaEdgeError as error:
            self.bad_joint_states += 1
            self._complain(error)
            return
        self._process.send_joints(state)
        if self._arming and self._process.listened:
            self._arm()

    def _arm(self) -> None:
        now_ns = time.monotonic_ns()
        self._give_up_ns = self._give_up_ns or now_ns + _ARM_WITHIN_NS
        # asked before the order: a stop that refuses it may be released, in another thread, before it comes back
        stopped = self._stopped
        if not self._order("rearm") or stopped or now_ns > self._give_up_ns:
            self._arming = False

    def _on_chunk(self, message: JointTrajectory) -> None:
        try:
            self._process.send_chunk(convert.to_chunk(message))
        except VlaEdgeError as error:
            self.bad_chunks += 1
            self._complain(error)

    def _on_emergency_stop(self, message: Bool) -> None:
        self._stopped = message.data
        if message.data:
            self._arming = False
        self._process.emergency_stop(message.data)

    def _on_speed_scale(self, message: Float64) -> None:
        try:
            self._process.set_speed_scale(message.data)
        except ControlError as error:
            self._complain(error)

    def _on_operator(self, message: JointState) -> None:
        try:
            self._process.send_operator(tuple(message.name), np.array(message.position))
        except ControlError as error:
            self.bad_operator += 1
            self._complain(error)

    def _answer(self, order: str, response: Trigger.Response) -> Trigger.Response:
        if order in ("hold", "damp"):
            self._arming = False
        problem = self._order(order)
        response.success, response.message = not problem, problem or f"{order} done"
        return response

    def _order(self, order: str) -> str:
        """Carries an order out; what was wrong, or nothing."""
        try:
            getattr(self._process, order)()
        except (ControlError, ControlProcessError) as error:
            self._complain(error)
            return str(error)
        return ""

    def _complain(self, error: VlaEdgeError) -> None:
        self.last_problem = str(error)
        self._node.get_logger().warning(str(error), throttle_duration_sec=5.0)
