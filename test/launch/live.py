"""Nodes in processes of their own, and a peer in this one that talks to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from lifecycle_msgs.msg import State, Transition
from rclpy.impl.implementation_singleton import rclpy_implementation

from vla_edge.nodes.client import ConductError, Conductor, NoAnswerError
from vla_edge.robots.g1 import DRIVEN_JOINTS

AFTER = {
    Transition.TRANSITION_CONFIGURE: State.PRIMARY_STATE_INACTIVE,
    Transition.TRANSITION_ACTIVATE: State.PRIMARY_STATE_ACTIVE,
    Transition.TRANSITION_DEACTIVATE: State.PRIMARY_STATE_INACTIVE,
    Transition.TRANSITION_CLEANUP: State.PRIMARY_STATE_UNCONFIGURED,
}
"""States that transitions lead to."""

SOURCE = Path(__file__).resolve().parents[2]


class NodeProcess:
    """One executable of the package, run from source.

    Args:
        executable: module in vla_edge.nodes.
        namespace: keeps tests apart from each other.
        parameters: name -> value as on the command line; names that begin with __ or / remap the node itself or a topic.
        log: file for everything it prints.
    """

    def __init__(self, executable: str, namespace: str, log: Path, **parameters):
        command = [sys.executable, "-c", f"from vla_edge.nodes.{executable} import main; main()", "--ros-args"]
        command += ["-r", f"__ns:={namespace}"]
        for name, value in parameters.items():
            command += ["-r" if name.startswith(("__", "/")) else "-p", f"{name}:={value}"]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]))
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, timeout: float) -> int:
        """Exit code; the process is killed, and the test fails, when it does not end by itself."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"the node did not end within {timeout} s:\n{self.output}") from None

    def stop(self, timeout: float = 15.0, number: int = signal.SIGINT) -> int:
        """As Ctrl-C does, or by another signal."""
        if self.running:
            self._process.send_signal(number)
        return self.wait(timeout)

    def kill(self) -> None:
        """Without warning."""
        self._process.kill()
        self._process.wait()


class Peer:
    """A node in this process: publishes, listens, calls. Use it as a context manager.

    Attributes:
        heard: topic -> messages.
    """

    def __init__(self, namespace: str):
        import rclpy

        self.node = rclpy.create_node("peer", namespace=namespace)
        self.heard: dict[str, list] = {}
        self._conductor = Conductor(self.node)
        self._lock = threading.Lock()

    def listen(self, kind, topic: str, qos) -> list:
        """Messages of a topic, growing."""
        messages = self.heard.setdefault(topic, [])
        self.node.create_subscription(kind, topic, messages.append, qos)
        return messages

    def call(self, service: str, timeout: float = 10.0) -> str:
        return self._conductor.call(service, timeout)

    def change(self, node: str, *transitions: int, timeout: float = 60.0) -> list[bool]:
        """Lifecycle transitions by id; whether each succeeded."""
        from lifecycle_msgs.srv import ChangeState, GetState

        done = []
        # One answered call first: see `Conductor.call` for what may happen to the answer of the very first.
        for _ in range(10):
            try:
                self._conductor.request(GetState, f"{node}/get_state", GetState.Request(), timeout / 10)
                break
            except ConductError:
                continue
        for transition in transitions:
            request = ChangeState.Request()
            request.transition.id = transition
            try:
                done.append(self._conductor.request(ChangeState, f"{node}/change_state", request, timeout / 2).success)
            except NoAnswerError:  # it may be lost and the transition made; the state tells
                reached = Conductor.wait(lambda wanted=AFTER[transition]: self._state(node) == wanted, timeout / 2)
                done.append(bool(reached))
        return done

    def _state(self, node: str) -> int | None:
        """Of a lifecycle node by id; None without an answer."""
        from lifecycle_msgs.srv import GetState

        try:
            return self._conductor.request(GetState, f"{node}/get_state", GetState.Request(), 5.0).current_state.id
        except ConductError:
            return None

    def set_parameter(self, node: str, name: str, value) -> str:
        """Sets a parameter; empty, or why that was refused."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        (result,) = self._conductor.request(SetParameters, f"{node}/set_parameters", request, 10.0).results
        return "" if result.successful else result.reason

    def diagnostics(self, node: str, condition=lambda values: True, timeout: float = 15.0) -> dict[str, str]:
        """The values of the next status of a node for which `condition` holds."""
        from diagnostic_msgs.msg import DiagnosticArray

        from vla_edge.nodes import qos

        topic = f"{node}/status"
        messages = self.heard[topic] if topic in self.heard else self.listen(DiagnosticArray, topic, qos.DIAGNOSTICS)
        seen, deadline, values = len(messages), time.monotonic() + timeout, {}
        while time.monotonic() < deadline:
            for message in messages[seen:]:
                seen += 1
                status = message.status[0]
                values = {pair.key: pair.value for pair in status.values} | {"message": status.message}
                if condition(values):
                    return values
            time.sleep(0.02)
        raise AssertionError(f"{node} did not come to say so; last: {values}")

    def __enter__(self) -> Peer:
        self._conductor.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._conductor.__exit__()
        self.node.destroy_node()


class FakeRobot:
    """A camera and joints that stand still, published at their rates until closed.

    Attributes:
        pixels: of the camera, (480, 640, 3).
        positions: of the joints, rad.
        names: of the joints, in the order they are published in.
        frames, joints: switch the streams on and off.
        clock: stamps of joint states, ns.
    """

    def __init__(self, peer: Peer, camera_rate: float = 30.0, joint_rate: float = 100.0):
        from sensor_msgs.msg import Image, JointState

        from vla_edge.nodes import qos

        self.pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        self.positions = np.zeros(len(DRIVEN_JOINTS))
        self.names = list(DRIVEN_JOINTS)
        self.frames = self.joints = True
        self.clock = time.time_ns
        self._image = peer.node.create_publisher(Image, "head/image", qos.SENSOR_OUT)
        self._joints = peer.node.create_publisher(JointState, "joint_states", qos.SENSOR_OUT)
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._every, args=(1.0 / rate, work), daemon=True)
            for rate, work in ((camera_rate, self._send_frame), (joint_rate, self._send_joints))
        ]
        for thread in self._threads:
            thread.start()

    def _every(self, period: float, work) -> None:
        due = time.monotonic()
        while not self._end.is_set():
            try:
                work()
            except rclpy_implementation.InvalidHandle:
                return  # the test is over
            due = max(due + period, time.monotonic() - period)
            time.sleep(max(0.0, due - time.monotonic()))

    def _send_frame(self) -> None:
        from vla_edge.nodes import convert

        if self.frames:
            self._image.publish(convert.to_image(time.time_ns(), "head", self.pixels))

    def _send_joints(self) -> None:
        from sensor_msgs.msg import JointState

        from vla_edge.nodes import convert

        if self.joints:
            message = JointState(name=list(self.names), position=convert.doubles(self.positions))
            message.header.stamp = convert.to_time(self.clock())
            self._joints.publish(message)

    def close(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(2.0)


def wait_for(condition, timeout: float, what: str):
    """The first true value of `condition`."""
    value = Conductor.wait(condition, timeout)
    assert value, f"waited {timeout} s in vain for {what}"
    return value
