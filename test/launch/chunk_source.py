"""A source of action chunks to be killed: a slow wave from where the robot was told to be, ten chunks a second.

    python chunk_source.py NAMESPACE [DELAY [shuffle]]

Chunks come DELAY s after their observation; with `shuffle` every second one is overtaken by the next.
"""

from __future__ import annotations

import sys
import time
from collections import deque

import numpy as np
import rclpy
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from vla_edge.nodes import convert, qos
from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.types import ActionChunk

PERIOD = 0.1


def main(namespace: str, delay: float = 0.0, shuffle: bool = False) -> None:
    """Publishes until killed."""
    rclpy.init()
    node = rclpy.create_node("chunk_source", namespace=namespace)
    heard: list[JointState] = []
    node.create_subscription(JointState, "joint_command", heard.append, qos.SENSOR)
    publisher = node.create_publisher(JointTrajectory, "action_chunk", qos.chunk(PERIOD, 1.6))
    while not heard:
        rclpy.spin_once(node, timeout_sec=0.1)
    start, began, count = np.array(heard[0].position), time.time(), 0
    waiting: deque[ActionChunk] = deque()
    while True:
        now = time.time()
        seconds = now - began + 0.05 * np.arange(1, 33)
        wave = 0.15 * (1 - np.cos(0.8 * np.pi * seconds))[:, None] * np.ones(len(DRIVEN_JOINTS))
        waiting.append(ActionChunk(int(now * 1e9), DRIVEN_JOINTS, start + wave, 0.05))
        count += 1
        if len(waiting) > round(delay / PERIOD) + shuffle:
            if shuffle and count % 2:
                waiting.rotate(-1)
                chunk = waiting.popleft()
                waiting.rotate(1)
            else:
                chunk = waiting.popleft()
            publisher.publish(convert.to_trajectory(chunk))
        rclpy.spin_once(node, timeout_sec=0.0)
        time.sleep(PERIOD)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0, "shuffle" in sys.argv[3:])
