"""What a controller's inputs do when two threads of theirs meet; everything else is tested with whole nodes."""

import threading
import time

import pytest
from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool

from vla_edge.control.kernel import ControlError
from vla_edge.nodes.control_inputs import ControlInputs

JOINT_STATE = serialize_message(JointState(name=["joint"], position=[0.0], velocity=[0.0]))


class Process:
    """A controller whose emergency stop is released while an order to arm that it has refused is still under way."""

    joint_names, listened = ("joint",), True

    def __init__(self):
        self.stopped, self.armed, self.release = False, False, lambda: None

    def send_joints(self, state):
        pass

    def emergency_stop(self, pressed):
        self.stopped = pressed

    def rearm(self):
        if self.stopped:
            self.release()
            raise ControlError("emergency stop is pressed; release it, then re-arm")
        self.armed = True


@pytest.fixture
def inputs(make_node):
    made = ControlInputs(make_node(), Process())
    yield made
    made.destroy()


def press(inputs, pressed):
    """As the node's executor does, which is another thread than the one that takes joint states."""
    thread = threading.Thread(target=inputs._on_emergency_stop, args=(Bool(data=pressed),))
    thread.start()
    thread.join()


@pytest.mark.parametrize("released_meanwhile", [False, True])
def test_an_emergency_stop_ends_the_wish_to_arm_whenever_it_is_released(inputs, released_meanwhile):
    process = inputs._process
    press(inputs, True)
    if released_meanwhile:
        process.release = lambda: press(inputs, False)
    inputs.arm_by_itself(True)
    inputs._on_joints(JOINT_STATE, None)
    assert "emergency stop is pressed" in inputs.last_problem
    press(inputs, False)
    for _ in range(3):
        inputs._on_joints(JOINT_STATE, None)
    assert not process.armed


def test_arming_by_itself_outlasts_other_refusals(inputs, monkeypatch):
    process, begin = inputs._process, time.monotonic_ns()
    process.stopped = True  # as if refused for another reason: no emergency stop was pressed
    inputs.arm_by_itself(True)
    inputs._on_joints(JOINT_STATE, None)
    process.stopped = False
    inputs._on_joints(JOINT_STATE, None)
    assert process.armed and time.monotonic_ns() - begin < 5e9
