"""A source of action chunks to be killed: a slow wave from where the robot stood, ten chunks a second.

    python chunk_source.py NAMESPACE
"""

from __future__ import annotations

import sys
import time

import numpy as np
import rclpy
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from vla_edge.nodes import convert, qos
from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.types import ActionChunk


def main(namespace: str) -> None:
    """Publishes until killed."""
    rclpy.init()
    node = rclpy.create_node("chunk_source", namespace=namespace)
    heard: list[JointState] = []
    node.create_subscription(JointState, "joint_states", heard.append, qos.SENSOR)
    publisher = node.create_publisher(JointTrajectory, "action_chunk", qos.chunk(0.1, 1.6))
    while not heard:
        rclpy.spin_once(node, timeout_sec=0.1)
    start, began = np.array(heard[0].position), time.time()
    while True:
        now = time.time()
        seconds = now - began + 0.05 * np.arange(1, 33)
        wave = 0.15 * (1 - np.cos(0.8 * np.pi * seconds))[:, None] * np.ones(len(DRIVEN_JOINTS))
        publisher.publish(convert.to_trajectory(ActionChunk(int(now * 1e9), DRIVEN_JOINTS, start + wave, 0.05)))
        rclpy.spin_once(node, timeout_sec=0.0)
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
