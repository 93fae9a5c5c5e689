"""The simulated G1 at its table, in real time: joint commands in, joint states and camera images out.

Physics runs in a thread on absolute deadlines, which takes the newest command as it goes; pictures are drawn by another
process. ~/reset sets a scene up by its seed, and the world judges how the instruction was carried out.
"""

from __future__ import annotations

import json
import threading
import time

import rclpy
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64MultiArray, Int64, String

from vla_edge.control.loop import DeadlineLoop
from vla_edge.nodes import convert, qos
from vla_edge.nodes.params import Parameter, Parameters
from vla_edge.nodes.run import prioritize, run_node
from vla_edge.nodes.sim_camera import CameraProcess, View
from vla_edge.nodes.stream import Stream
from vla_edge.sim.tasks import TIERS
from vla_edge.sim.view import state_vector
from vla_edge.sim.world import STEP_NS, TabletopWorld
from vla_edge.types import NANOSECONDS, VlaEdgeError

PARAMETERS = (
    Parameter("tier", "touch", "difficulty of the scenes", choices=TIERS),
    Parameter("seed", 0, "of the first scene", 0, 2**62),
    Parameter("joint_state_rate", 250, "joint states per second; a whole number of physics steps", 50, 500),
    Parameter("camera_rate", 15.0, "most pictures per second", 1.0, 60.0),
    Parameter("camera_height", 480, "pixels", 16, 960),
    Parameter("camera_width", 640, "pixels", 16, 1280),
    Parameter("overview_every", 4, "one picture of the overview camera for this many of the head camera", 1, 1000),
    Parameter("jpeg_quality", 90, "of compressed images", 1, 100),
    Parameter("priority", 20, "SCHED_FIFO priority of physics, which stands for a robot that waits for nobody; 0: none",
              0, 98),
    Parameter("camera_nice", 5, "steps that drawing stands back behind physics and control", 0, 19),
)


class SimNode(Node):
    """See the file's first lines."""

    def __init__(self):
        super().__init__("sim")
        values = Parameters(self, PARAMETERS).read()
        self._values = values
        self._period_ns = NANOSECONDS // values.joint_state_rate // STEP_NS * STEP_NS
        self._joints = self.create_publisher(JointState, "joint_states", qos.SENSOR_OUT)
        self._instruction = self.create_publisher(String, "instruction", qos.LATCHED)
        self._episode = self.create_publisher(String, "~/episode", qos.LATCHED)
        self._outcome = self.create_publisher(String, "~/outcome", qos.LATCHED)
        self._state = self.create_publisher(Float64MultiArray, "~/state", qos.SENSOR_OUT)
        self._success = self.create_publisher(Bool, "~/success", qos.LATCHED)
        size = (values.camera_height, values.camera_width)
        self._camera = CameraProcess(
            (
                View("head", self.resolve_topic_name("head/image"), *size),
                View("overview", self.resolve_topic_name("overview/image"), *size, values.overview_every),
            ),
            self.get_namespace(), values.camera_nice, values.jpeg_quality,
        )
        self.exit_code = 0
        self._world = TabletopWorld()
        self._wanted_seed: int | None = values.seed
        self._decided = True
        self._next_picture_ns = 0
        self._commands = Stream(self, JointState, "joint_command", self._on_command, qos.SENSOR)
        self.create_subscription(Int64, "~/reset", self._on_reset, qos.COMMAND)
        self._loop = DeadlineLoop(self._period_ns, self._tick)
        self._thread = threading.Thread(target=self._loop.run, name="physics", daemon=True)
        self._thread.start()
        prioritize(values.priority)

    def close(self) -> None:
        """Ends physics and cameras."""
        self._loop.stop()
        self._thread.join(2.0)
        self._commands.destroy()
        self._camera.close()

    def _on_command(self, message: JointState, info) -> None:
        try:
            self._world.apply(convert.to_command(message))
        except (ValueError, VlaEdgeError) as error:
            self.get_logger().warning(str(error), throttle_duration_sec=5.0)

    def _on_reset(self, message: Int64) -> None:
        self._wanted_seed = message.data

    def _tick(self, deadline_ns: int) -> None:
        seed, self._wanted_seed = self._wanted_seed, None
        if seed is not None:
            self._reset(seed)
        self._commands.drain()
        self._world.step(self._period_ns / NANOSECONDS)
        stamp_ns, state = time.time_ns(), self._world.joint_state()
        message = convert.to_joint_state(state)
        message.header.stamp = convert.to_time(stamp_ns)
        self._joints.publish(message)
        if deadline_ns >= self._next_picture_ns:
            period_ns = round(NANOSECONDS / self._values.camera_rate)
            self._next_picture_ns = max(self._next_picture_ns + period_ns, deadline_ns)
            snapshot = self._world.snapshot()
            self._camera.show(stamp_ns, snapshot)
            if self._state.get_subscription_count():
                self._state.publish(Float64MultiArray(data=convert.doubles(state_vector(snapshot))))
            if not self._camera.alive and not self.exit_code:
                self.get_logger().fatal("the camera process is gone; its own message above says why")
                self.exit_code = 1
                self._loop.stop()
                rclpy.try_shutdown()
        if not self._decided and self._world.finished():
            self._decided = True
            self._tell_outcome()

    def _reset(self, seed: int) -> None:
        try:
            episode = self._world.reset(seed, self._values.tier)
        except VlaEdgeError as error:
            self.get_logger().error(f"reset to seed {seed} failed: {error}")
            return
        self._decided = False
        told = {
            "seed": seed, "tier": episode.tier, "goal": episode.goal.name, "instruction": episode.instruction,
            "time_limit_s": episode.time_limit_s,
        }
        self._told = told
        self._episode.publish(String(data=json.dumps(told)))
        self._instruction.publish(String(data=episode.instruction))

    def _tell_outcome(self) -> None:
        outcome = self._world.outcome()
        told = self._told | {
            "success": bool(outcome.success), "wrong_first": bool(outcome.wrong_first), "touched": outcome.touched,
            "seconds": float(outcome.time_s), "min_distance_m": float(outcome.min_distance_m),
        }
        self._outcome.publish(String(data=json.dumps(told)))
        self._success.publish(Bool(data=bool(outcome.success)))


def main(args=None) -> None:
    """Runs the node."""
    run_node(SimNode, args)
