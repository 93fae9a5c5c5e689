"""A camera and joints for benchmarks: fixed pictures, joints that go where they are told, an instruction.

    python benchmarks/robot_source.py CAMERA_HZ JOINT_HZ INSTRUCTION
"""

from __future__ import annotations

import sys
import time

import numpy as np
import rclpy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from vla_edge.control.loop import DeadlineLoop
from vla_edge.control.realtime import prioritize
from vla_edge.nodes import convert, middleware, qos
from vla_edge.nodes.stream import Stream
from vla_edge.sim.world import HOME, TabletopWorld


def main(camera_hz: float, joint_hz: float, instruction: str) -> None:
    """Publishes until interrupted."""
    middleware.prepare()
    rclpy.init()
    node = rclpy.create_node("robot_source", start_parameter_services=False)
    image = node.create_publisher(Image, "head/image", qos.SENSOR_OUT)
    joints = node.create_publisher(JointState, "joint_states", qos.SENSOR_OUT)
    words = node.create_publisher(String, "instruction", qos.LATCHED)
    words.publish(String(data=instruction))
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    picture = convert.to_image(0, "head_camera", pixels)
    state = JointState(name=list(TabletopWorld.joint_names), position=convert.doubles(HOME))
    position = np.frombuffer(state.position)

    def follow(message: JointState, info) -> None:
        position[:] = message.position

    commands = Stream(node, JointState, "joint_command", follow, qos.SENSOR)
    every, count = max(1, round(joint_hz / camera_hz)), 0

    def tick(deadline_ns: int) -> None:
        nonlocal count
        commands.drain()
        stamp = convert.to_time(time.time_ns())
        state.header.stamp = stamp
        joints.publish(state)
        count += 1
        if count % every == 0:
            picture.header.stamp = stamp
            image.publish(picture)

    prioritize(20)
    try:
        DeadlineLoop(round(1e9 / joint_hz), tick).run()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
